"""The embedding table against one-hot vectors and plain matrix products."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from minillama.embedding import Embedding


def table(vocab_size: int = 7, dim: int = 4, dtype: torch.dtype = torch.float32) -> Embedding:
    embedding = Embedding(vocab_size, dim).to(dtype)
    torch.manual_seed(0)
    torch.nn.init.normal_(embedding.weight)
    return embedding


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 0), (0, 3)])
def test_tokens_become_rows_as_one_hot_vectors_times_the_table(shape):
    embedding, tokens = table(), torch.randint(7, shape, generator=torch.Generator().manual_seed(1))
    assert embedding(tokens).shape == (*shape, 4)
    assert torch.equal(embedding(tokens), F.one_hot(tokens, 7).float() @ embedding.weight)


def test_scores_compare_with_every_row():
    embedding, x = table(), torch.randn(2, 3, 4)
    expected = torch.stack([(x * row).sum(-1) for row in embedding.weight], dim=-1)
    torch.testing.assert_close(embedding.scores(x), expected)


def test_a_row_gathers_the_gradients_of_all_its_uses():
    embedding, tokens, out_grad = table(), torch.tensor([[3, 1, 3]]), torch.randn(1, 3, 4)
    embedding(tokens).backward(out_grad)
    assert torch.equal(embedding.weight.grad[3], out_grad[0, 0] + out_grad[0, 2])
    assert torch.equal(embedding.weight.grad[1], out_grad[0, 1])
    assert (embedding.weight.grad[[0, 2, 4, 5, 6]] == 0).all()


class InAndOut(torch.nn.Module):
    def __init__(self, embedding: Embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding.scores(self.embedding(tokens))


def test_a_tied_table_learns_on_the_way_in_and_on_the_way_out():
    model, tokens = InAndOut(table(dtype=torch.float64)), torch.tensor([[5, 2]])

    def run(weight):
        return torch.func.functional_call(model, {"embedding.weight": weight}, (tokens,))

    assert gradcheck(run, model.embedding.weight.detach().requires_grad_())


@pytest.mark.parametrize("token", [-1, 7, 2**40])
def test_a_token_that_is_not_in_the_table_is_refused(token):
    with pytest.raises(IndexError):
        table()(torch.tensor([[0, token]]))


def test_the_table_is_its_only_parameter():
    assert [(name, tuple(weight.shape)) for name, weight in table().named_parameters()] == [("weight", (7, 4))]
