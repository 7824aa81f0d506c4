"""The clinic: what the charts show, and that the right medicine heals."""

import pytest

from minillama.course import clinic
from minillama.course.chapters.clinic import HEALTHY, PATIENTS


def test_in_the_clinic_the_right_medicine_heals_and_the_wrong_one_does_not():
    wrong = clinic.treat("G", HEALTHY["loss"], steps=60)  # its norm is still what it was: it dies at step 44
    assert len(wrong["loss"]) < 60 and not wrong["gradient"][-1] < float("inf")
    healed = clinic.treat("G", HEALTHY["norm"], steps=60)
    assert len(healed["loss"]) == 60 and healed["loss"][-1] < 3
    assert clinic.chart("G", healed).data.startswith(b"\x89PNG")


def test_the_clinic_refuses_other_names():
    with pytest.raises(ValueError, match="no patient 'Z', expected one of healthy, A, B"):
        clinic.chart("Z")
    with pytest.raises(ValueError, match="no part 'my_norm', expected one of batch_order, learning_rate"):

        def my_norm(x, weight, eps):
            return x

        clinic.treat("G", my_norm)


@pytest.mark.parametrize("patient", PATIENTS)
def test_each_patients_chart_shows_its_disease(patient):
    """What the sentences in DISEASES promise, in numbers."""
    sick, healthy = clinic._charts()[patient], clinic._charts()["healthy"]
    fault = PATIENTS[patient][0]
    last, validation = sum(sick["loss"][-20:]) / 20, sick["validation"][-1][1]
    assert (last < 0.6 * sick["floor"] and validation < 0.6 * sick["floor"]) == (fault in ("visible", "split"))
    assert (sick["moved"]["embedding"] == 0) == (fault == "optimizer_groups")
    assert (sick["rate"][0] > sick["rate"][40]) == (fault == "learning_rate")
    assert (len(sick["loss"]) < clinic.STEPS) == (fault == "norm") == (sick["stream"][-1][-1] > 1e6)
    assert (sick["loss"] == healthy["loss"]) == (fault == "positions")
    if fault == "loss":
        assert last > 1.2 * sum(healthy["loss"][-20:]) / 20
    if fault == "batch_order":
        assert validation > 1.1 * last and max(sick["loss"][250:]) > 1.5 * last
