"""AutoAttack through the library: verdicts of a direct call, journals, nothing disturbed."""

import json
import sys

import pytest
import torch
from conftest import ShortOfMemory, SmallNet

import attacks
import auto_attack
import evaluation

pytest.importorskip("pyautoattack", reason="pip install -r requirements-eval.txt")
EPS, COUNT, BATCH = 3 / 255, 50, 20


@pytest.fixture(scope="module")
def case(fitted):
    """A network and a few images, not a multiple of the batch."""
    model, x, y = fitted
    return model, x[:COUNT].contiguous(), y[:COUNT]


def ours(model, x, y, name, **changes):
    upright = attacks.standing(model, x, y, 100)
    settings = dict(epsilon=EPS, batch_size=BATCH, seed=3) | changes
    return auto_attack.attack(model, x, y, upright, name, **settings)


def directly(model, x, y, parts):
    """One call of the library on all images, as its README shows it."""
    make, title = auto_attack.library()
    adversary = make(model, norm="Linf", eps=EPS, seed=3, version="standard", device="cpu")
    adversary.attacks_to_run = list(parts)
    run = adversary.run_standard_evaluation
    size = {"batch_size": BATCH} if title.startswith("pyautoattack") else {"bs": BATCH}
    found = run(x, y, **size)
    x_adv = found[0] if isinstance(found, tuple) else found
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    return attacks.standing(model, x_adv, y, BATCH)


@pytest.mark.slow
def test_the_verdicts_are_those_of_a_direct_call_image_by_image(case):
    outcome = ours(*case, "autoattack")
    parts = ("apgd-ce", "apgd-t", "fab-t", "square")
    assert torch.equal(outcome.standing, directly(*case, parts))
    assert tuple(outcome.parts) == parts and 0 < outcome.parts["square"] < COUNT
    assert outcome.library.startswith(("autoattack", "pyautoattack 0."))


def test_a_single_part_is_that_part(case):
    outcome = ours(*case, "apgd-ce")
    assert torch.equal(outcome.standing, directly(*case, ["apgd-ce"]))
    assert outcome.passes > 100 * outcome.standing.sum() and outcome.journal is None


def test_where_no_image_stands_nothing_is_attacked(case):
    model, x, y = case
    none = torch.zeros(COUNT, dtype=torch.bool)
    outcome = auto_attack.attack(model, x, y, none, "autoattack", epsilon=EPS, batch_size=9, seed=0)
    assert not outcome.standing.any() and outcome.passes == 0
    assert outcome.parts == dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square"), 0)


def test_a_batch_too_large_for_the_memory_is_halved(case, capsys):
    model, x, y = case
    short = ShortOfMemory(model, 6)
    upright = attacks.standing(model, x, y, 100)
    outcome = auto_attack.attack(
        short, x, y, upright, "apgd-ce", epsilon=EPS, batch_size=BATCH, seed=3
    )
    whole = ours(*case, "apgd-ce").standing
    assert "note: out of GPU memory; apgd-ce goes on with 10 images" in capsys.readouterr().out
    assert (outcome.standing & ~upright).sum() == 0 and (outcome.standing != whole).sum() <= 2
    with pytest.raises(torch.OutOfMemoryError):
        auto_attack.attack(
            ShortOfMemory(model, 0), x, y, upright, "apgd-ce", epsilon=EPS, batch_size=4, seed=3
        )


def test_processes_deal_batches_of_the_size_that_suits_all(case, tmp_path, monkeypatch):
    monkeypatch.setattr(auto_attack.parallel, "maxima", lambda *sizes: [max(-5, *sizes)])
    seen = []
    monkeypatch.setattr(
        auto_attack, "fallen", lambda m, x, y, *_, **__: seen.append(len(y)) or y < 0
    )
    standing = ours(*case, "apgd-ce").standing
    assert set(seen) <= {5, sum(seen) % 5} and sum(seen) == standing.sum()  # another has halved its


def test_an_image_that_falls_in_another_process_has_fallen(case, monkeypatch):
    model, x, y = case
    upright, felled = attacks.standing(model, x, y, 100), y == y[0]
    monkeypatch.setattr(auto_attack.parallel, "minimum_", lambda mine: mine * ~felled)
    monkeypatch.setattr(auto_attack, "fallen", lambda m, x, y, *_, **__: y < 0)  # none in this one
    assert torch.equal(ours(*case, "square").standing, upright & ~felled)
    assert (upright & felled).any()


@pytest.mark.parametrize("name, version, parts", [
    ("autoattack", "standard", 4), ("autoattack-plus", "plus", 6),
])  # fmt: skip
def test_the_library_is_asked_for_the_version_of_the_name(case, monkeypatch, name, version, parts):
    made = []

    class Fake:
        def __init__(self, model, norm, eps, seed, version, device):
            made.append((version, norm, eps, seed))

        def run_standard_evaluation(self, x, y, bs):
            return x

    monkeypatch.setattr(auto_attack, "library", lambda: (Fake, "fake 1"))
    model, x, y = case
    ours(model, x[:9], y[:9], name)
    assert made == [(version, "Linf", EPS, 3)] * parts


def test_a_journal_belongs_to_a_network_its_images_labels_and_settings(case):
    model, x, y = case
    torch.manual_seed(0)
    names = {
        auto_attack.fingerprint(*given)
        for given in (
            (model, x, y, 1), (SmallNet(), x, y, 1), (model, x[1:], y, 1), (model, x, y[1:], 1),
            (model, x, y, 2),
        )
    }  # fmt: skip
    assert len(names) == 5


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_killed_run_goes_on_where_it_was(case, tmp_path, monkeypatch):
    whole = ours(*case, "apgd-ce")
    real, calls = auto_attack.fallen, []

    def dies_at_the_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(auto_attack, "fallen", dies_at_the_second)
    with pytest.raises(Killed):
        ours(*case, "apgd-ce", folder=tmp_path)
    (journal,) = tmp_path.iterdir()
    assert len(json.loads(journal.read_text())) == 1
    resumed = ours(*case, "apgd-ce", folder=tmp_path)
    assert len(calls) == 2 + 2  # three batches: one from the journal, two run
    assert torch.equal(resumed.standing, whole.standing) and resumed.parts == whole.parts
    assert resumed.passes == whole.passes and journal.exists()  # autoattack can go on from it
    ours(*case, "apgd-ce", folder=tmp_path, seed=4)  # other settings have a journal of their own
    model, x, y = case
    upright = attacks.standing(model, x, y, 100)
    upright[upright.nonzero()[0]] = False  # an attack before it felled one, in a cascade
    settings = dict(epsilon=EPS, batch_size=BATCH, seed=3)
    fewer = auto_attack.attack(model, x, y, upright, "apgd-ce", folder=tmp_path, **settings)
    fresh = auto_attack.attack(model, x, y, upright, "apgd-ce", **settings)
    assert torch.equal(fewer.standing, fresh.standing)
    assert len(list(tmp_path.iterdir())) == 3


def test_autoattack_goes_on_from_its_first_two_parts(case, tmp_path, monkeypatch):
    run = []

    def fells_a_quarter(model, x, y, part, *args, **kwargs):
        run.append(part)
        return (255 * x.flatten(1).sum(1)).round() % 4 == len(part) % 4

    monkeypatch.setattr(auto_attack, "fallen", fells_a_quarter)
    whole = ours(*case, "autoattack")
    assert len(set(whole.parts.values())) == 3
    assert ours(*case, "apgd-ce", folder=tmp_path).journal is None
    half = ours(*case, "apgd", folder=tmp_path)
    assert half.journal is None and list(half.parts) == ["apgd-ce", "apgd-t"]
    alone = ours(*case, "apgd-t", folder=tmp_path)  # on the images that apgd-ce had felled, too
    assert torch.equal(alone.standing, ours(*case, "apgd-t").standing) and alone.journal is None
    run.clear()
    resumed = ours(*case, "autoattack", folder=tmp_path)
    assert set(run) == {"fab-t", "square"}
    assert torch.equal(resumed.standing, whole.standing) and resumed.parts == whole.parts
    assert [resumed.journal] == list(tmp_path.iterdir())


def test_a_broken_journal_is_as_good_as_none(tmp_path):
    (tmp_path / "j").write_text('{"apgd-ce 0": {"fe')
    assert auto_attack.Journal(tmp_path / "j").batches == {}


def test_the_library_disturbs_nothing(case, capsys):
    _, x, y = case
    model = SmallNet().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rng, tracing = torch.get_rng_state(), sys.gettrace()
    ours(model, x, y, "apgd-ce", batch_size=8)
    assert torch.equal(torch.get_rng_state(), rng) and sys.gettrace() is tracing
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training and capsys.readouterr().out == ""


def test_without_a_library_one_line_says_what_to_install(monkeypatch, case):
    monkeypatch.setattr(auto_attack, "LIBRARIES", ("no_such_library",))
    with pytest.raises(ValueError, match=r"pip install -r requirements-eval\.txt"):
        ours(*case, "autoattack")


def test_the_report_has_it_beside_the_others(case):
    model, x, y = case
    settings = evaluation.Settings(epsilon=EPS, batch_size=BATCH, seed=3)
    rows, verdicts, _ = evaluation.evaluate(model, x, y, ["clean", "pgd-5", "apgd-ce"], settings)
    row = rows[2]
    assert row["attack"] == "apgd-ce" and row["library"].startswith(auto_attack.LIBRARIES)
    assert row["standing_after"] == {"apgd-ce": int(verdicts["apgd-ce"].sum())}
    assert not (verdicts["apgd-ce"] & ~verdicts["clean"]).any()
