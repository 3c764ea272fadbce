"""What only a GPU can show: the captured step, whole runs, and that it judges as the CPU does."""

import copy
import gc
import re

import numpy as np
import pytest
import torch
from test_engine import attack_of, flags
from test_scripts import read_log, shell

import data
import engine
import evaluation
import schedules
from models import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
TINY = ["--synthetic", "--device", "cuda", "--width", "8", "--batch-size", "100"]
TINY += ["--train-images", "1000", "--held-out", "100"]


def losses(compile_, words, dtype, batch, steps=6):
    """Loss terms of some steps of the whole method, from the same weights and random state."""
    x, y = (part.cuda() for part in batch)
    pixels = (x.permute(0, 2, 3, 1) * 255).byte()
    batches = data.TrainingBatches(data.Images(pixels, y), len(y))
    args = flags("--compile", compile_, "--batch-size", "32", *words)
    args.dtype = dtype
    torch.manual_seed(0)
    model = build_model("PreActResNet18", num_classes=10, width=8)
    model = model.to("cuda", memory_format=torch.channels_last)
    build, _ = engine.prepare(model, batches, args)
    step = build(attack_of(args), 32)
    del build, batches, model
    gc.collect()
    spoilt = [torch.full((size,), 77, device="cuda") for size in (32, 64, 4096, 2**20)]
    torch.manual_seed(1)
    index = torch.arange(32, device="cuda")
    row = torch.tensor(schedules.Row(lr=0.05, T=2, T_a=2, W=1, lam=0.7, pull=0.1), device="cuda")
    step(index, row)
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = [step(index.flip(0), row).clone() for _ in range(steps)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all((tensor == 77).all() for tensor in spoilt)
    return torch.stack(terms).cpu()


@pytest.mark.parametrize("words, dtype", [
    (["--attack-mode", "eval"], torch.float32),
    (["--attack-mode", "train"], torch.float32),
    (["--attack-mode", "both", "--mixup-alpha", "0.2"], torch.float32),
    (["--attack-mode", "both"], torch.bfloat16),
    (["--attack-mode", "both"], torch.float16),
    (["--kl-reference", "ema"], torch.float32),
    (["--kl-reference", "clean", "--kl-gradient", "both"], torch.float32),
    (["--attack-steps", "10", "--delta-init", "uniform"], torch.float32),
])  # fmt: skip
def test_the_captured_step_is_the_eager_step_and_neither_waits(words, dtype, batch, monkeypatch):
    """And it holds what it reads, where nothing else does any more."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    eager, captured = (losses(compile_, words, dtype, batch) for compile_ in ("off", "on"))
    assert eager.isfinite().all() and len(eager[:, 0].unique()) == len(eager)
    rtol = 1e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(captured[:, :2], eager[:, :2], rtol=rtol, atol=0)
    torch.testing.assert_close(captured[:, 2], eager[:, 2], rtol=20 * rtol, atol=0)  # small: 0.01


@pytest.mark.parametrize("words", [
    ["--epochs", "2"],
    ["--epochs", "2", "--precision", "fp16"],
    ["--epochs", "2", "--compile", "off"],
    ["--preset", "fast", "--epochs", "4"],
    ["--epochs", "2", "--baseline", "trades"],
], ids=["defaults", "fp16", "eager", "growing", "trades"])  # fmt: skip
def test_the_scripts_run_on_a_gpu(tmp_path, words):
    code, out, err = shell(tmp_path, "MIX_KL_CIFAR10.py", *TINY, *words, "--run-name", "gpu")
    assert (code, err) == (0, "") and "1 x cuda" in out
    folder = tmp_path / "output" / "gpu"
    trained = [float(row["loss"]) for row in read_log(folder)]
    assert trained[-1] < trained[0] and np.isfinite(trained).all()
    path = folder / "final_model.pth"
    words = ["--synthetic", "--model_path", path, "--attacks", "clean", "pgd-10", "cw-10"]
    code, out, err = shell(tmp_path, "test_cifar10.py", *words, "--n-examples", "200")
    assert (code, err) == (0, "") and "worst case" in out and "1 x cuda" in out


def test_a_run_goes_on_on_a_gpu_where_it_was_stopped(tmp_path):
    """Not bit by bit: two runs on a GPU differ in the order of sums."""
    words = [*TINY, "--train-images", "2000", "--precision", "fp32", "--lr-schedule", "constant"]

    def train(name, *more):
        code, out, err = shell(
            tmp_path, "MIX_KL_CIFAR10.py", *words, *more, "--run-name", name, "--resume"
        )
        assert (code, err) == (0, ""), out
        return [float(row["loss"]) for row in read_log(tmp_path / "output" / name)]

    train("halves", "--epochs", "3")
    whole = train("whole", "--epochs", "4")
    halves = train("halves", "--epochs", "4", "--allow-changed")
    assert len(halves) == len(whole) == 4
    assert halves == pytest.approx(whole, rel=0.03)


@pytest.mark.parametrize("name", ["clean", "pgd-20", "cw-20", "autoattack"])
def test_a_gpu_gives_the_verdicts_of_the_cpu(fitted, name):
    if name == "autoattack":
        pytest.importorskip("pyautoattack")
    model, x, y = fitted
    count = 64 if name == "autoattack" else len(x)
    twin = copy.deepcopy(model).cuda()
    verdicts = []
    for network, device in ((model, "cpu"), (twin, "cuda")):
        settings = evaluation.Settings(epsilon=2 / 255, batch_size=64, seed=0)
        before = torch.cuda.get_rng_state()
        _, found, _ = evaluation.evaluate(
            network, x[:count].to(device), y[:count].to(device), [name], settings
        )
        assert torch.equal(before, torch.cuda.get_rng_state())
        verdicts.append(found[name])
    assert name == "clean" or 0.1 < verdicts[0].float().mean() < 0.9  # else any two would agree
    assert (verdicts[0] != verdicts[1]).float().mean() <= 0.03


def test_a_gpu_without_the_memory_halves_the_batch_and_judges_the_same(capsys):
    torch.manual_seed(0)
    model = build_model("PreActResNet18", num_classes=10).cuda().eval()
    x = torch.rand(256, 3, 32, 32, device="cuda")
    with torch.no_grad():
        y = model(x).argmax(1)
    found = []
    _, total = torch.cuda.mem_get_info()
    for share in (1.0, (torch.cuda.memory_allocated() + 0.6e9) / total):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share)
        settings = evaluation.Settings(epsilon=1 / 255, batch_size=256, seed=0)
        try:
            found.append(evaluation.evaluate(model, x, y, ["pgd-3"], settings)[1]["pgd-3"])
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    assert re.search(r"out of GPU memory; going on with --batch-size \d+", capsys.readouterr().out)
    assert (found[0] != found[1]).float().mean() <= 0.02
