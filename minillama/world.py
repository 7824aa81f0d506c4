"""The toy world (chapter 08): a grammar of short stories whose probabilities are known exactly.

A story is told by walking through the grammar below and making choices. Two rules make each text have one derivation
only: every choice is heard at once, and no option's opening words begin another option's. So `sample` makes a story
together with its exact log-probability, and `log_prob` finds the same number back from the text alone, or says where
the text leaves the world. The entropy of the world follows from the grammar by adding up (`entropy`).

How the grammar is written:

    [big|small*2]      a choice; `*2` makes an option twice as likely
    {colour:colours}   a new fact: a word from a list, remembered under a name
    {colour}           the same word again, much later perhaps: this is what a model must learn to copy
    {they} {them} {their}   the child's pronouns; {friend.they} … the friend's; a capital letter starts a sentence
    {=mood happy}      a hidden fact: remembered, not said
    English ~ 中文      the same in Chinese, in which {1}, {2} … stand for the English side's choices

The words at the top, the plots, the tasks at the bottom, and the machinery in between: read it in that order.
"""

# ruff: noqa: E501  (a line of the grammar is a sentence, in two languages)

import functools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------------------
# Words: English, Chinese, and what else must agree (a name's pronoun, a thing's measure word).

_WORDS = {
    "names": """Lily 莉莉 she, Mia 米娅 she, Anna 安娜 she, Emma 艾玛 she, Zoe 佐伊 she, Ruby 露比 she, Grace 格蕾丝 she,
        Sara 萨拉 she, Lucy 露西 she, Nora 诺拉 she, Daisy 黛西 she, Molly 莫莉 she, Ella 埃拉 she, Rosa 罗莎 she,
        Ivy 艾薇 she, Hana 哈娜 she, Tom 汤姆 he, Ben 本 he, Max 麦克斯 he, Sam 山姆 he, Leo 利奥 he, Jack 杰克 he,
        Finn 芬恩 he, Oscar 奥斯卡 he, Tim 蒂姆 he, Noah 诺亚 he, Henry 亨利 he, Luke 卢克 he, Omar 奥马尔 he,
        Theo 西奥 he, Hugo 雨果 he, Kai 凯 he""",
    "family": "mom 妈妈, dad 爸爸, grandma 奶奶, grandpa 爷爷, aunt 阿姨, uncle 叔叔",
    "colours": "red 红色, blue 蓝色, green 绿色, yellow 黄色, purple 紫色, pink 粉色, white 白色, brown 棕色",
    "shades": "black 黑色, grey 灰色, golden 金色, silver 银色, violet 紫罗兰色, navy 藏青色, cream 米色, teal 青色",
    "things": """kite 风筝 只, ball 球 个, hat 帽子 顶, boat 小船 艘, drum 鼓 面, doll 娃娃 个, car 小汽车 辆, book 书 本,
        scarf 围巾 条, bell 铃铛 个, lamp 灯 盏, cup 杯子 个, coat 外套 件, flag 旗子 面, train 小火车 列, robot 机器人 个,
        basket 篮子 个, pillow 枕头 个, blanket 毯子 条, whistle 哨子 个, lantern 灯笼 盏, puppet 木偶 个,
        rocket 小火箭 枚, pencil 铅笔 支""",
    "animals": """rabbit 兔子, puppy 小狗, kitten 小猫, duck 鸭子, turtle 乌龟, frog 青蛙, mouse 老鼠, squirrel 松鼠,
        fox 狐狸, bear 熊, goat 山羊, monkey 猴子, panda 熊猫, sparrow 麻雀, hedgehog 刺猬, lamb 小羊""",
    "places": """park 公园, beach 海滩, forest 森林, market 市场, library 图书馆, zoo 动物园, school 学校, garden 花园,
        river 河边, farm 农场, museum 博物馆, lake 湖边, meadow 草原, playground 操场""",
    "homes": """by the sea~海边, near a forest~森林旁边, on a farm~农场里, in a small town~小镇上, on a green hill~青山上,
        beside a river~河边, in a big city~大城市里, by a mill~磨坊旁边""",
    "hobbies": """sing songs~唱歌, paint pictures~画画, climb trees~爬树, count stars~数星星, bake bread~烤面包,
        read stories~读故事, plant flowers~种花, dance~跳舞, swim~游泳, tell jokes~讲笑话, play chess~下棋,
        ride a bike~骑自行车, build towers~搭高塔, catch fish~钓鱼, collect shells~收集贝壳, draw maps~画地图""",
    "spots": """under the tree~树下, behind the rock~石头后面, on the bench~长椅上, near the gate~大门旁边, in the grass~草丛里,
        beside the well~井边, below the bridge~桥下, outside the shed~棚子外面, atop the wall~墙头上, inside the barrel~木桶里,
        by the fence~篱笆旁边, between the bushes~灌木丛之间""",
    "times": "morning 早上, afternoon 下午, evening 傍晚, night 夜里",
    "tools": "glue 胶水, tape 胶带, string 绳子, thread 线, paste 浆糊, wire 铁丝",
    "foods": """carrot 胡萝卜 根, nut 坚果 颗, cookie 饼干 块, pear 梨 个, cherry 樱桃 颗, pancake 煎饼 张, banana 香蕉 根,
        plum 李子 个""",
    "items": "vase 花瓶, plate 盘子, clock 时钟, mirror 镜子, teapot 茶壶, window 窗户",
    "happy": "happy 高兴, glad 快乐, cheerful 开心, joyful 欢喜, merry 愉快",
    "sad": "sad 难过, unhappy 伤心, gloomy 沮丧, lonely 孤单, tearful 想哭",
    "proud": "proud 自豪, brave 勇敢, strong 坚强, confident 自信, important 了不起",
    "sorry": "sorry 抱歉, guilty 内疚, ashamed 惭愧, regretful 后悔, foolish 愚蠢",
    "angry": "angry 生气, cross 来气, furious 愤怒, upset 不满, grumpy 不高兴",
}
MOODS = ("happy", "sad", "proud", "sorry", "angry")

# ---------------------------------------------------------------------------------------------------------------------
# The grammar. A line is a sentence; the plots are the options of one choice, so each one's opening words differ.

_OPENING = """
[Once upon a time~从前|Long ago~很久以前|Not so long ago~不久以前|Many years ago~许多年前], there was a [little*3~小小|kind*2~善良|brave~勇敢|shy~害羞|clever~聪明|funny~有趣|quiet~安静] child named {child:names}. ~ {1}，有一个{2}的孩子，名叫{child}。
{They} lived {home:homes} with {their} {giver:family} and [loved~最爱|liked~喜欢] to {hobby:hobbies}. ~ {they}和{their}{giver}住在{home}，{1}{hobby}。
[One day*2~有一天|For {their} birthday~生日那天|Last spring~去年春天|One morning~一天早上], {their} {giver} [gave*2~送给{them}|bought~给{them}买了|made~给{them}做了] {them} a [big*2~大大|small*2~小小|shiny~闪亮|lovely~可爱|brand new~崭新] {colour:colours} {thing:things}. ~ {1}，{their}{giver}{2}一{measure}{3}的{colour}{thing}。
"""

_PLOTS = {
    "lost": """
The next {time:times}, {child} took the {thing} to the {place:places} and left it {spot:spots}. ~ 第二天{time}，{child}把{thing}带到{place}，放在了{spot}。
{They} played with {their} friend {friend:names} until [it was late~很晚|they got tired~累了|the bell rang~铃声响起|it began to rain~开始下雨]. ~ {they}和{their}朋友{friend}一直玩到{1}。
At home, {child} looked in the [kitchen~厨房|bedroom~卧室|attic~阁楼|hall~走廊] and found only a [sock~一只袜子|spoon~一把勺子|button~一颗纽扣|leaf~一片叶子|coin~一枚硬币]. ~ 回到家，{child}在{1}里找，只找到{2}。
"[Think hard~好好想想|Do not worry~别担心|Wait a moment~等一下|Let us go back~我们回去吧]," said {friend}. ~ “{1}，”{friend}说。
[They ran back, and the {colour} {thing} was still {spot}!{=mood happy}*2~他们跑回去，{colour}{thing}还在{spot}！|They searched {spot}, but the {colour} {thing} was gone forever.{=mood sad}~他们去{spot}找，可是{colour}{thing}永远不见了。] ~ {1}
""",
    "broken": """
But one {time:times}, {child} dropped the {thing} on the [stairs~楼梯|floor~地板|road~马路|stones~石头] and it came apart. ~ 可是一天{time}，{child}把{thing}掉在{1}上，摔散了。
{They} put the pieces in a [box~盒子|bag~袋子|jar~罐子|bucket~水桶] and hid it {spot:spots}. ~ {they}把碎片放进一个{1}，藏在{spot}。
Soon {their} friend {friend:names} came by with some {tool:tools}. ~ 不久，{their}朋友{friend}带着一些{tool}来了。
"Will the {tool} [help~有用|hold~粘得住|do~行|work~管用]?" asked {child}. Every piece was still {spot}. ~ “这{tool}{1}吗？”{child}问。碎片全都还在{spot}。
{friend} worked [for an hour~修了一个小时|all day~修了一整天|very slowly~慢慢地修|with great care~非常小心地修], and with the {tool} the {colour} {thing} [was as good as new.{=mood happy}*2~变得像新的一样。|fell apart again.{=mood sad}~又散开了。] ~ {friend}{1}，用了{tool}，{colour}{thing}{2}
""",
    "shared": """
At the {place:places}, {their} friend {friend:names} sat {spot:spots} and saw the {thing}. ~ 在{place}，{their}朋友{friend}坐在{spot}，看见了{thing}。
"[May I play with it~我可以玩一下吗|Can I hold it~我可以拿一下吗|Is it yours~这是你的吗]?" asked {friend}. ~ “{1}？”{friend}问。
"[No~不行|Go away~走开|It is mine~这是我的|Find your own~你自己去找一个]!" said {child}, and {friend} began to [cry~哭|shake~发抖|walk away~走开|look at the ground~看着地面]. ~ “{1}！”{child}说，{friend}开始{2}。
Then {child} thought of what {their} {giver} always said: "[Be kind~要善良|Toys are for two~玩具要两个人玩|Share and smile~分享就会微笑|Friends come first~朋友最重要]." ~ 这时{child}想起{their}{giver}常说的话：“{1}。”
[So the two took turns with the {colour} {thing} until dark.{=mood happy}*2~于是两个人轮流玩{colour}{thing}，一直玩到天黑。|When {they} went back with the {colour} {thing}, nobody was {spot}.{=mood sorry}~当{they}拿着{colour}{thing}回去时，{spot}已经没有人了。] ~ {1}
""",
    "hidden": """
On a [warm~温暖|rainy~下雨|windy~刮风|snowy~下雪|foggy~有雾] {time:times}, {child} and {their} friend {friend:names} played a game. ~ 在一个{1}的{time}，{child}和{their}朋友{friend}玩游戏。
{child} hid the {thing} {spot:spots} and said, "Find it!" ~ {child}把{thing}藏在{spot}，说：“来找吧！”
"Is it {guess:spots}?" asked {friend}. "[No~不是|Cold~不对|Wrong~错了|Never~才不是]!" ~ “在{guess}吗？”{friend}问。“{1}！”
"Then [on the roof~屋顶上|in your pocket~你的口袋里|up the chimney~烟囱里|behind your back~你的背后]!" [shouted~喊道|whispered~小声说|guessed~猜道] {friend}, but {friend.they} was wrong. ~ “那一定在{1}！”{friend}{2}，可是{friend.they}猜错了。
[At last {friend} looked {spot} and found the {colour} {thing}.{=mood happy}~最后{friend}往{spot}一看，找到了{colour}{thing}。|"I give up," said {friend}, so {child} showed the {colour} {thing} {spot}.{=mood proud}~“我认输了，”{friend}说，于是{child}从{spot}拿来了{colour}{thing}。] ~ {1}
""",
    "rescue": """
While walking to the {place:places}, {child} heard a [cry~哭声|squeak~吱吱声|soft voice~轻轻的声音|splash~水声]. ~ 在去{place}的路上，{child}听到了{1}。
A [tiny~小小|wet~湿湿|hungry~饥饿|frightened~受惊] {animal:animals} was stuck {spot:spots}. ~ 一只{1}的{animal}被困在{spot}。
{child} called {their} friend {friend:names}, who brought a [rope~绳子|ladder~梯子|net~网|stick~棍子]. ~ {child}叫来了{their}朋友{friend}，{friend.they}带着{1}。
Together they stood {spot} and held out the {colour} {thing} to the {animal}. ~ 他们一起站在{spot}，向{animal}递出{colour}{thing}。
[The {animal} grabbed it and was safe at last.{=mood proud}*2~{animal}抓住了它，终于安全了。|But the {animal} only [stared~瞪着眼|shivered~发抖] and would not let them help.{=mood sad}~可是{animal}只是{1}，不让他们帮忙。] ~ {1}
""",
    "gift": """
Soon it was the birthday of {their} friend {friend:names}, and {child} had no present. ~ 不久就是{their}朋友{friend}的生日了，{child}没有礼物。
{They} thought of a [cake~蛋糕|song~歌|card~卡片|flower~花], but that was [too small~太小了|not enough~还不够|too easy~太简单了|soon gone~很快就没了]. ~ {they}想到了{1}，但是那{2}。
So {they} wrapped the {thing} and kept it {spot:spots} until the party. ~ 于是{they}把{thing}包起来，放在{spot}，一直等到聚会。
At the party, a {animal:animals} [danced~跳起舞来|sang~唱起歌来|ate the cake~吃掉了蛋糕|fell asleep~睡着了], and everyone laughed. ~ 聚会上，一只{animal}{1}，大家都笑了。
[From its place {spot}, {child} brought the {colour} {thing}, and {friend} and the {animal} hugged {them}.{=mood proud}*2~{child}从{spot}拿来{colour}{thing}，{friend}和{animal}拥抱了{them}。|But {spot}, rain had spoiled the {colour} {thing} for {friend}.{=mood sad}~可是在{spot}，雨水把要送给{friend}的{colour}{thing}弄坏了。] ~ {1}
""",
    "taken": """
Suddenly a [cheeky~调皮|quick~敏捷|naughty~淘气|sly~狡猾] {animal:animals} took the {thing} and ran to the {place:places}. ~ 突然，一只{1}的{animal}拿走了{thing}，跑向{place}。
{child} and {their} friend {friend:names} followed it [over a hill~翻过小山|through the mud~穿过泥地|past a tower~经过高塔|across the street~穿过街道]. ~ {child}和{their}朋友{friend}跟着它{1}。
They saw the {animal} {spot:spots}, [busy with a nest~忙着做窝|fast asleep~睡得很香|full of mud~满身是泥|laughing at them~在笑他们]. ~ 他们看见{animal}在{spot}，{1}。
{friend} had a {food:foods} and put it on the ground. ~ {friend}有一{portion}{food}，把它放在地上。
The {animal} [ate the {food} and gave the {colour} {thing} back.{=mood happy}*2~吃了{food}，把{colour}{thing}还了回来。|took the {food} as well and kept the {colour} {thing}.{=mood angry}~把{food}也拿走了，还留下了{colour}{thing}。] ~ {animal}{1}
""",
    "storm": """
That {time:times} a storm came, and the wind blew the {thing} [over the roof~飞过屋顶|out of the yard~飞出院子|into the sky~飞上天空|down the street~沿街飞走]. ~ 那天{time}来了一场暴风雨，风把{thing}吹得{1}。
From the window, {child} saw it land {spot:spots}. ~ {child}从窗户看见它落在{spot}。
When the sun came out, {they} put on {their} [boots~穿上靴子|gloves~戴上手套|raincoat~穿上雨衣|old shoes~穿上旧鞋] and called {their} friend {friend:names}. ~ 太阳出来时，{they}{1}，叫上了{their}朋友{friend}。
On the way they met a {animal:animals} and [waved to it~向它挥手|asked it for help~请它帮忙|fed it some bread~喂它面包|took it along~带上了它]. ~ 路上他们遇到一只{animal}，{1}。
[The {animal} saw the {colour} {thing} {spot}, wet but whole.{=mood happy}*2~{animal}看见{colour}{thing}在{spot}，湿了，但是完好。|Only a piece of the {colour} {thing} was left {spot}.{=mood sad}~{spot}只剩下{colour}{thing}的一小块。] ~ {1}
""",
    "swapped": """
Near the {place:places}, {child} met {their} friend {friend:names}, who had a {other:shades} {thing}. ~ 在{place}附近，{child}遇到了{their}朋友{friend}，{friend.they}有一{measure}{other}{thing}。
They played [pirates~海盗|kings and queens~国王和王后|tag~捉人|spies~间谍] and left both toys {spot:spots}. ~ 他们玩{1}，把两个玩具都放在{spot}。
Then it [got late~天晚了|grew cold~天冷了|was time to eat~该吃饭了], and in a hurry {child} took the wrong one. ~ 后来{1}，{child}匆忙中拿错了。
"Why is your {thing} {other} now?" asked {their} {giver}. ~ “你的{thing}现在怎么是{other}的？”{their}{giver}问。
{child} ran back, and {friend} was [waiting {spot} with the {colour} {thing}.{=mood happy}*2~拿着{colour}{thing}在{spot}等着。|crying {spot} and could not find the {colour} {thing}.{=mood sorry}~在{spot}哭，找不到{colour}{thing}。] ~ {child}跑回去，{friend}{1}
""",
    "truth": """
Playing with the {thing} indoors, {child} broke a {item:items}. ~ {child}在屋里玩{thing}，打破了一个{item}。
{They} hid the pieces {spot:spots} and [went to bed~回屋里睡了|said nothing~什么也没说|ran outside~跑到外面|began to whistle~吹起了口哨]. ~ {they}把碎片藏在{spot}，{1}。
"Who broke the {item}?" asked {their} {giver}. "Was it the {animal:animals}?" ~ “谁打破了{item}？”{their}{giver}问。“是{animal}吗？”
{child} [turned red~脸红了|looked away~看向别处|took a deep breath~深吸一口气|bit {their} lip~咬着嘴唇] and thought of {their} friend {friend:names}, who never lied. ~ {child}{1}，想起了{their}从不说谎的朋友{friend}。
"[It was me and the {colour} {thing}, and the pieces are {spot}," said {child}.{=mood proud}*2~“是我和{colour}{thing}，碎片在{spot}，”{child}说。|Yes, the {animal}," lied {child}, and sat alone {spot} with the {colour} {thing}.{=mood sorry}~“是的，是{animal}，”{child}撒谎说，然后独自带着{colour}{thing}坐在{spot}。] ~ {1}
""",
}

_ENDING = """
[That night~那天晚上|In the end~最后|After that~在那之后|Back home~回到家], {child} told {their} {giver} and felt {feeling:moods}. ~ {1}，{child}告诉了{their}{giver}，感到很{feeling}。
[The next day~第二天|A week later~一周后|When summer came~夏天来了|From then on~从那以后], {child} and {friend} went to {hobby} [every day~天天|after school~放学后|before breakfast~在早饭前|together again~又一起]. ~ {1}，{child}和{friend}{2}去{hobby}。
"""

_SUMMARIES = {
    "lost": "{child} left the {colour} {thing} {spot} at the {place}. ~ {child}把{colour}{thing}忘在了{place}的{spot}。",
    "broken": "{child} broke the {colour} {thing}, and {friend} tried to mend it with {tool}. ~ {child}摔散了{colour}{thing}，{friend}用{tool}修理它。",
    "shared": "{friend} wanted to play with the {colour} {thing}, and {child} said no at first. ~ {friend}想玩{colour}{thing}，{child}一开始不肯。",
    "hidden": "{child} hid the {colour} {thing} {spot}, and {friend} looked for it. ~ {child}把{colour}{thing}藏在{spot}，{friend}去找。",
    "rescue": "{child} and {friend} tried to save a {animal} with the {colour} {thing}. ~ {child}和{friend}想用{colour}{thing}救一只{animal}。",
    "gift": "{child} kept the {colour} {thing} {spot} as a present for {friend}. ~ {child}把{colour}{thing}放在{spot}，作为给{friend}的礼物。",
    "taken": "A {animal} took the {colour} {thing}, and {friend} offered it a {food}. ~ 一只{animal}拿走了{colour}{thing}，{friend}给了它一{portion}{food}。",
    "storm": "A storm blew the {colour} {thing} away, and it landed {spot}. ~ 暴风雨吹走了{colour}{thing}，它落在{spot}。",
    "swapped": "{child} took the {other} {thing} of {friend} by mistake. ~ {child}错拿了{friend}的{other}{thing}。",
    "truth": "{child} broke a {item} and hid the pieces {spot}. ~ {child}打破了一个{item}，把碎片藏在{spot}。",
}

_QUESTIONS = {
    "colour": ("What colour was the {thing}?", "{colour}"),
    "giver": ("Who gave {child} the {thing}?", "{their} {giver}"),
    "friend": ("Who was the friend of {child}?", "{friend}"),
    "home": ("Where did {child} live?", "{home}"),
    "hobby": ("What did {child} do for fun?", "{hobby}"),
    "animal": ("Which animal is in the story?", "a {animal}"),
    "place": ("Which place is in the story?", "the {place}"),
    "tool": ("What did {friend} use?", "{tool}"),
    "food": ("What did {friend} offer?", "a {food}"),
    "item": ("What did {child} break?", "a {item}"),
    "other": ("What colour was the {thing} of {friend}?", "{other}"),
}
_WHERE = {
    "lost": "Where did {child} leave the {thing}?",
    "broken": "Where were the pieces?",
    "shared": "Where did {friend} sit?",
    "hidden": "Where was the {thing} hidden?",
    "rescue": "Where was the {animal} stuck?",
    "gift": "Where was the present kept?",
    "taken": "Where did they find the {animal}?",
    "storm": "Where did the {thing} land?",
    "swapped": "Where did they leave both toys?",
    "truth": "Where were the pieces?",
}

_WHY = {
    "lost": {"happy": "the {colour} {thing} was still {spot}", "sad": "the {colour} {thing} was gone forever"},
    "broken": {"happy": "the {colour} {thing} was as good as new", "sad": "the {colour} {thing} fell apart again"},
    "shared": {"happy": "the two took turns with the {colour} {thing}", "sorry": "nobody was {spot}"},
    "hidden": {"happy": "{friend} found the {colour} {thing}", "proud": "{friend} had to give up"},
    "rescue": {"proud": "the {animal} was safe at last", "sad": "the {animal} would not let them help"},
    "gift": {"proud": "{friend} and the {animal} hugged {them}", "sad": "rain had spoiled the {colour} {thing}"},
    "taken": {
        "happy": "the {animal} gave the {colour} {thing} back",
        "angry": "the {animal} kept the {colour} {thing}",
    },
    "storm": {
        "happy": "the {colour} {thing} was wet but whole",
        "sad": "only a piece of the {colour} {thing} was left",
    },
    "swapped": {"happy": "{friend} was waiting {spot}", "sorry": "{friend} could not find the {colour} {thing}"},
    "truth": {"proud": "{they} said who broke the {item}", "sorry": "{they} lied about the {item}"},
}

# ---------------------------------------------------------------------------------------------------------------------
# What the world gives.


class Fault(ValueError):
    """A text leaves the world: at the character `position`. The message says what was expected there."""

    def __init__(self, message: str, position: int):
        super().__init__(f"{message} (at character {position})")
        self.position = position


@dataclass(frozen=True)
class Story:
    """A text, its exact log-probability in nats, the facts behind it (name → English words) and its translation."""

    text: str
    log_prob: float
    facts: dict[str, str]
    chinese: str


@dataclass(frozen=True)
class Task:
    """Something to do with a story, and the one right answer. `kind`: story, mood, question, summary or translation."""

    kind: str
    prompt: str
    answer: str


def sample(rng: random.Random, heldout: bool = False) -> Story:
    """Draw a story. With `heldout`, its colour and thing are a pair that no other story has: texts never trained on."""
    return WORLD.sample(rng, heldout)


def read(text: str, heldout: bool = False) -> Story:
    """The story that a text tells. Raises `Fault` where the text leaves the world («the kite was 'blue', now 'red'»)."""
    return WORLD.read(text, heldout)


def log_prob(text: str, heldout: bool = False) -> float:
    """The exact log-probability of a text in nats. Raises `Fault` for a text that the world never tells."""
    return read(text, heldout).log_prob


def surprises(text: str, heldout: bool = False) -> list[float]:
    """-log_prob, shared out among the characters: nats of each, most of them 0, where the world leaves no choice.

    A choice counts where the text first differs from what else could have been said. Raises `Fault` as `log_prob` does.
    """
    return WORLD.surprises(text, heldout)


def entropy(heldout: bool = False) -> float:
    """The entropy of a story in nats: the mean of -log_prob over all stories, added up from the grammar."""
    return WORLD.entropy(heldout)


@functools.cache
def held_out(colour: str, thing: str) -> bool:
    """Whether no training text has this pair. Each colour is kept from three things, and each thing from one colour."""
    colours, things = ([word.english for word in WORLD.words[name]] for name in ("colours", "things"))
    return (things.index(thing) - 3 * colours.index(colour)) % len(colours) == 0


def tasks(story: Story) -> list[Task]:
    """Everything that can be asked about a story, with its exact answer."""
    facts = {name: Word(text, "") for name, text in story.facts.items()}
    told = f"{story.text}\n"
    asked = [(_WHERE[story.facts["plot"]], "{spot}")]
    asked += [pair for name, pair in _QUESTIONS.items() if name in facts]
    asked += [("Why was {child} {feeling} in the end?", f"because {_WHY[story.facts['plot']][story.facts['mood']]}")]
    summary = _split(_SUMMARIES[story.facts["plot"]], "~")[0].strip()
    return [
        Task("story", _fill("Tell a story about {child} and a {colour} {thing}.", facts), story.text),
        Task("mood", told + _fill("How did {child} feel?", facts), story.facts["mood"]),
        *(Task("question", told + _fill(question, facts), _fill(answer, facts)) for question, answer in asked),
        Task("summary", told + "Say it in one sentence.", _fill(summary, facts)),
        Task("translation", told + "Say it in Chinese.", story.chinese),
    ]


def excerpt(story: Story, rng: random.Random) -> list[Task]:
    """What can be asked about one to six of the story's sentences, drawn by `rng`, that stand one after the other:
    questions whose answers are there in words, and the translation. Both languages have a sentence for a sentence."""
    english = re.findall(r'.+?[.!?]"?(?: |$)', story.text)
    chinese = re.findall(r".+?[。！？]”?", story.chinese)
    count = rng.randint(1, 6)
    first = rng.randrange(len(english) - count + 1)
    text = "".join(english[first : first + count]).strip()
    found = [Task("translation", f"{text}\nSay it in Chinese.", "".join(chinese[first : first + count]))]
    for task in tasks(story):
        if task.kind == "question" and task.answer.removeprefix("because ") in text:
            found.append(Task("question", text + "\n" + task.prompt.rpartition("\n")[2], task.answer))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The machinery: the grammar's text becomes a tree, and whoever walks through the tree decides at each choice.


class Word(NamedTuple):
    """A word of a list. `also` is what agrees with it: a name's pronoun, a thing's measure word in Chinese."""

    english: str
    chinese: str
    also: str = ""


Facts = dict[str, Word]


@dataclass(frozen=True)
class _Say:
    text: str


@dataclass(frozen=True)
class _Recall:
    name: str


@dataclass(frozen=True)
class _New:
    name: str
    among: str


@dataclass(frozen=True)
class _Hidden:
    name: str
    value: str


@dataclass(frozen=True)
class _Choice:
    options: "tuple[_Template, ...]"
    weights: tuple[float, ...]  # they sum to 1
    openings: tuple[tuple[str, ...], ...]  # the texts with which each option can begin


@dataclass(frozen=True)
class _Template:
    nodes: "tuple[_Say | _Recall | _New | _Hidden | _Choice | _Template, ...]"
    chinese: str


class Grammar:
    """A set of texts with exact probabilities: `text` is in the notation above, `words` holds the lists."""

    def __init__(self, text: str, words: dict[str, list[Word]]):
        self.words = words
        for name, entries in words.items():
            _refuse_shared_openings([(word.english,) for word in entries], f"the list {name!r}")
        self.root = _parse(text, words)

    def sample(self, rng: random.Random, heldout: bool = False) -> Story:
        """Draw one story."""
        return self._walk(_Sampler(rng, heldout))

    def read(self, text: str, heldout: bool = False) -> Story:
        """Find the one derivation of a text. Raises Fault where it leaves the grammar."""
        if not isinstance(text, str):
            raise Fault(f"expected a text, found {type(text).__name__}", 0)
        return self._walk(_Reader(text, heldout))

    def surprises(self, text: str, heldout: bool = False) -> list[float]:
        """Nats of each character of a text. Raises Fault where it leaves the grammar."""
        reader = _Reader(text, heldout)
        self._walk(reader)
        return reader.nats

    def stories(self, heldout: bool = False) -> Iterator[Story]:
        """Every story once: for grammars small enough to count."""
        script: list[int] | None = []
        while script is not None:
            teller = _Script(script, heldout)
            yield self._walk(teller)
            script = teller.next_script()

    def entropy(self, heldout: bool = False) -> float:
        """The entropy of a text in nats.

        Which word is taken from a list never changes how many are left to choose from later, nor does the way a
        sentence was begun; so the first word and the first option stand for all when facts are needed later on.
        """
        return self._entropy(self.root, {}, heldout)

    def _walk(self, teller: "_Teller") -> Story:
        facts: Facts = {}
        chinese = self._tell(self.root, facts, teller)
        teller.end()
        known = {name: word.english for name, word in facts.items()}
        return Story("".join(teller.said), teller.log_prob, known, chinese)

    def _tell(self, template: _Template, facts: Facts, teller: "_Teller") -> str:
        """Say the template's English through the teller; return its Chinese."""
        parts: list[str] = []
        for node in template.nodes:
            match node:
                case _Say(text):
                    teller.say(text)
                case _Recall(name):
                    if isinstance(teller, _Reader):
                        self._compare(name, facts, teller)
                    teller.say(_look_up(name, facts).english)
                case _New(name, among):
                    words = self._candidates(among, facts, teller.heldout)
                    if isinstance(teller, _Reader):
                        self._refuse(among, words, facts, teller)
                    word = words[teller.pick([1 / len(words)] * len(words), [(word.english,) for word in words])]
                    _learn(facts, name, word)
                    teller.say(word.english)
                case _Hidden(name, value):
                    facts[name] = Word(value, "")
                case _Choice(options, weights, openings):
                    parts.append(self._tell(options[teller.pick(weights, openings)], facts, teller))
                case _Template():
                    parts.append(self._tell(node, facts, teller))
        return _fill(template.chinese, facts, parts)

    def _compare(self, name: str, facts: Facts, reader: "_Reader") -> None:
        """Where the text contradicts a fact, raise the Fault that names what was said before and what is said now."""
        said = _look_up(name, facts).english
        if reader.sees(said):
            return
        subject = f"the {name}"
        if name in ("colour", "other"):
            subject = f"the {facts['thing'].english}"
        elif name.lower() in _PRONOUNS or "." in name:
            subject = facts["friend" if "." in name else "child"].english
        rivals = next(list_ for list_ in [*_PRONOUNS.values(), *self.words.values()] if facts[name.lower()] in list_)
        for rival in rivals:
            other = rival.english.capitalize() if name[0].isupper() else rival.english
            if reader.sees(other):
                raise Fault(f"{subject} was {said!r}, now {other!r}", reader.position)

    def _refuse(self, among: str, words: list[Word], facts: Facts, reader: "_Reader") -> None:
        """Where the text names a word of the list that may not come now, raise the Fault that says why."""
        for word in self.words.get(among, []):
            if word in words or not reader.sees(word.english):
                continue
            if word in facts.values():
                raise Fault(
                    f"{word.english!r} is in the story already, expected another of the {among}", reader.position
                )
            colour = facts["colour"].english
            kept = "held out" if held_out(colour, word.english) else "not held out"
            raise Fault(f"the {colour} {word.english} is {kept}, expected another of the {among}", reader.position)

    def _candidates(self, among: str, facts: Facts, heldout: bool) -> list[Word]:
        """The words of a list that may come now: none that this story has said, and no pair that is kept out of it."""
        said = set(facts.values())
        words = [word for word in self.words[facts["mood"].english if among == "moods" else among] if word not in said]
        if among == "things" and "colour" in facts:
            words = [word for word in words if held_out(facts["colour"].english, word.english) == heldout]
        return words

    def _entropy(self, template: _Template, facts: Facts, heldout: bool) -> float:
        total = 0.0
        for node in template.nodes:
            match node:
                case _New(name, among):
                    words = self._candidates(among, facts, heldout)
                    _learn(facts, name, words[0])
                    total += math.log(len(words))
                case _Hidden(name, value):
                    facts[name] = Word(value, "")
                case _Choice(options, weights, _):
                    branches = [dict(facts) for _ in options]
                    for option, weight, branch in zip(options, weights, branches, strict=True):
                        total += weight * (self._entropy(option, branch, heldout) - math.log(weight))
                    facts.update(branches[0])
                case _Template():
                    total += self._entropy(node, facts, heldout)
        return total


class _Teller:
    """Whoever walks through the grammar: collects what is said, and the log-probability of what is chosen."""

    def __init__(self, heldout: bool):
        self.heldout = heldout
        self.said: list[str] = []
        self.log_prob = 0.0

    def say(self, text: str) -> None:
        self.said.append(text)

    def pick(self, weights: Sequence[float], openings: Sequence[tuple[str, ...]]) -> int:
        index = self.decide(weights, openings)
        self.log_prob += math.log(weights[index])
        return index

    def decide(self, weights: Sequence[float], openings: Sequence[tuple[str, ...]]) -> int:
        """The index of the option to take, given the texts with which each can begin."""
        raise NotImplementedError

    def end(self) -> None:
        """The story is over."""


class _Sampler(_Teller):
    """Chooses at random."""

    def __init__(self, rng: random.Random, heldout: bool):
        super().__init__(heldout)
        self.rng = rng

    def decide(self, weights: Sequence[float], openings: Sequence[tuple[str, ...]]) -> int:
        return self.rng.choices(range(len(weights)), weights)[0]


class _Reader(_Teller):
    """Chooses what a given text says."""

    def __init__(self, text: str, heldout: bool):
        super().__init__(heldout)
        self.text = text
        self.position = 0
        self.nats = [0.0] * len(text)

    def pick(self, weights: Sequence[float], openings: Sequence[tuple[str, ...]]) -> int:
        start, index = self.position, super().pick(weights, openings)
        possible = list(range(len(weights)))
        for place in range(start, len(self.text)):  # letter by letter, what else could have been said is ruled out
            if possible == [index]:
                break
            begun = self.text[start : place + 1]
            still = [i for i in possible if any(t.startswith(begun) or begun.startswith(t) for t in openings[i])]
            self.nats[place] += math.log(sum(weights[i] for i in possible) / sum(weights[i] for i in still))
            possible = still
        return index

    def sees(self, text: str) -> bool:
        return self.text.startswith(text, self.position)

    def found(self) -> str:
        return repr(self.text[self.position : self.position + 24]) if self.position < len(self.text) else "the end"

    def say(self, text: str) -> None:
        if not self.sees(text):
            common = next(i for i in range(len(text)) if not self.sees(text[: i + 1]))
            self.position += common
            raise Fault(f"expected {text[common:]!r}, found {self.found()}", self.position)
        super().say(text)
        self.position += len(text)

    def decide(self, weights: Sequence[float], openings: Sequence[tuple[str, ...]]) -> int:
        for index, texts in enumerate(openings):
            if any(self.sees(text) for text in texts):
                return index
        first = [repr(texts[0]) for texts in openings]
        listed = " or ".join(first) if len(first) < 5 else f"{', '.join(first[:4])} … ({len(first)} in all)"
        raise Fault(f"expected {listed}, found {self.found()}", self.position)

    def end(self) -> None:
        if self.position < len(self.text):
            raise Fault(f"the story was over, found {self.found()}", self.position)


class _Script(_Teller):
    """Chooses as written down, and the first option from there on: to go through all stories in order."""

    def __init__(self, script: list[int], heldout: bool):
        super().__init__(heldout)
        self.script = script
        self.taken: list[int] = []
        self.counts: list[int] = []

    def decide(self, weights: Sequence[float], openings: Sequence[tuple[str, ...]]) -> int:
        step = len(self.taken)
        self.taken.append(self.script[step] if step < len(self.script) else 0)
        self.counts.append(len(weights))
        return self.taken[-1]

    def next_script(self) -> list[int] | None:
        """The script of the next story, as an odometer turns: None after the last."""
        for step in reversed(range(len(self.taken))):
            if self.taken[step] + 1 < self.counts[step]:
                return [*self.taken[:step], self.taken[step] + 1]
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Facts and their words.

_PRONOUNS = {
    "they": [Word("she", "她"), Word("he", "他")],
    "them": [Word("her", "她", "them"), Word("him", "他", "them")],
    "their": [Word("her", "她的", "their"), Word("his", "他的", "their")],
}


def _learn(facts: Facts, name: str, word: Word) -> None:
    """Remember a fact, and with it what must agree: pronouns for a name, the measure word for a thing."""
    facts[name] = word
    if word.also in ("she", "he"):
        for role, forms in _PRONOUNS.items():
            facts[role if name == "child" else f"{name}.{role}"] = forms[word.also == "he"]
    elif word.also:
        facts["portion" if name == "food" else "measure"] = Word("", word.also)


def _look_up(name: str, facts: Facts) -> Word:
    """The words of a fact; `They` is `they` at the start of a sentence."""
    word = facts[name.lower()]
    return Word(word.english.capitalize(), word.chinese, word.also) if name[0].isupper() else word


_FACT = re.compile(r"\{([\w.]+)\}")


def _fill(template: str, facts: Facts, parts: Sequence[str] | None = None) -> str:
    """Put facts into a text: Chinese if `parts`, the Chinese of its choices, are given; else English."""

    def replace(found: re.Match[str]) -> str:
        if parts is not None:
            return parts[int(found[1]) - 1] if found[1].isdigit() else _look_up(found[1], facts).chinese
        return _look_up(found[1], facts).english

    return _FACT.sub(replace, template)


# ---------------------------------------------------------------------------------------------------------------------
# From the notation to the tree.


def _words(text: str) -> list[Word]:
    """`kite 风筝 只, …`, or for words with spaces `by the sea~海边, …`."""
    entries = [entry.strip() for entry in text.split(",")]
    return [Word(*(entry.split("~") if "~" in entry else entry.split())) for entry in entries]


_SLOT = re.compile(r"\{=(?P<hidden>\w+) (?P<value>\w+)\}|\{(?P<new>\w+):(?P<among>\w+)\}|\{(?P<recall>[\w.]+)\}|\[")


def _split(text: str, separator: str) -> list[str]:
    """Split where the separator stands outside of all brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _close(text: str) -> tuple[str, str]:
    """What stands before and after the bracket that closes one already open."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth == 0:
            return text[:index], text[index + 1 :]
    raise ValueError(f"the choice [{text} is never closed, expected a ]: add it.")


def _parse(text: str, words: dict[str, list[Word]]) -> _Template:
    """A sentence (`English ~ Chinese`), or several, one a line."""
    lines = [_sentence(line.strip(), words) for line in _split(text.strip(), "\n")]
    if len(lines) == 1:
        return lines[0]
    spaced = [node for line in lines for node in (_Say(" "), line)]
    return _Template(tuple(spaced[1:]), "".join(f"{{{i + 1}}}" for i in range(len(lines))))


def _sentence(line: str, words: dict[str, list[Word]]) -> _Template:
    english, *chinese = _split(line, "~")
    english = english.strip() if chinese and chinese[0].startswith(" ") else english
    nodes: list = []
    while english:
        slot = _SLOT.search(english)
        literal = english[: slot.start()] if slot else english
        if literal:
            nodes.append(_Say(literal))
        if slot is None:
            break
        english = english[slot.end() :]
        if slot["hidden"]:
            nodes.append(_Hidden(slot["hidden"], slot["value"]))
        elif slot["new"]:
            nodes.append(_New(slot["new"], slot["among"]))
        elif slot["recall"]:
            nodes.append(_Recall(slot["recall"]))
        else:
            inside, english = _close(english)
            nodes.append(_choice(inside, words))
    choices = sum(isinstance(node, _Choice) for node in nodes)
    used = sorted(int(number) for number in re.findall(r"\{(\d+)\}", "".join(chinese)))
    if chinese and used != list(range(1, choices + 1)):
        raise ValueError(f"the Chinese of {line!r} uses the choices {used}, expected 1 to {choices}: use each once.")
    return _Template(tuple(nodes), "".join(chinese).strip())


def _choice(text: str, words: dict[str, list[Word]]) -> _Choice:
    options, weights = [], []
    for option in _split(text, "|"):
        english, *chinese = _split(option, "~")
        weight = re.search(r"\*(\d+)$", english)
        english = english[: weight.start()] if weight else english
        options.append(_parse("~".join([english, *chinese]), words))
        weights.append(int(weight[1]) if weight else 1)
    openings = [_openings(option, words) for option in options]
    _refuse_shared_openings(openings, f"the choice [{text}]")
    return _Choice(tuple(options), tuple(weight / sum(weights) for weight in weights), tuple(openings))


def _openings(template: _Template, words: dict[str, list[Word]]) -> tuple[str, ...]:
    """The texts with which a template can begin."""
    match next((node for node in template.nodes if not isinstance(node, _Hidden)), "nothing"):
        case _Say(text):
            return (text,)
        case _New(_, among):
            return tuple(word.english for word in words[among])
        case _Choice(_, _, openings):
            return tuple(text for texts in openings for text in texts)
        case _Template() as inner:
            return _openings(inner, words)
        case node:
            raise ValueError(f"an option begins with {node}, expected words of its own: say something first.")


def _refuse_shared_openings(openings: Sequence[tuple[str, ...]], where: str) -> None:
    """What makes every text unambiguous: no option's opening words begin another's."""
    texts = sorted(text for option in openings for text in option)
    for one, other in zip(texts, texts[1:], strict=False):
        if other.startswith(one):
            raise ValueError(f"{where} has {one!r} and {other!r}, expected openings that differ: change one.")


WORLD = Grammar(
    "\n".join(
        [
            _OPENING.strip(),
            "[" + "|".join(f"{{=plot {name}}}{text.strip()}" for name, text in _PLOTS.items()) + "] ~ {1}",
            _ENDING.strip(),
        ]
    ),
    {name: _words(text) for name, text in _WORDS.items()},
)
