"""The cells of the study: what each trains and how it is measured, the most telling ones first."""

from dataclasses import dataclass, field

BOTH = "--mixup-alpha 0.2 --kl-weight 1"
METHODS = {
    "fgsm_at": "--baseline fgsm_at",
    "fgsm_rs": "--baseline fgsm_rs",
    "n_fgsm": "--baseline n_fgsm",
    "mixup": "--mixup-alpha 0.2 --kl-weight 0 --temperature 1",
    "kl0": "--kl-weight 0",
    "kl": "--kl-weight 1",
    "kl4": "--kl-weight 4",
    "kl1to4": "--kl-weight 1:4",
    "kl4ramp": "--kl-weight 4 --kl-warmup 0.9",
    "kl1to4t1": "--kl-weight 1:4 --temperature 1",
    "ta1": "--kl-weight 1:4 --attack-temperature 1",
    "t4": "--kl-weight 1:4 --temperature 4",
    "t4to1": "--kl-weight 1:4 --temperature 4:1",
    "t1": f"{BOTH} --temperature 1",
    "pgd_at": "--baseline pgd_at",
    "rs_both": "--baseline fgsm_rs --attack-mode both",
    "n_both": "--baseline n_fgsm --attack-mode both",
    "both": BOTH,
    "train": f"{BOTH} --attack-mode train",
    "train8": "--mixup-alpha 0.2 --kl-weight 8 --attack-mode train",
    "eval0": "--mixup-alpha 0.2 --kl-weight 0 --attack-mode eval",
    "eval1": f"{BOTH} --kl-warmup 0.05 --attack-mode eval",
    "fgsm_rs16": "--baseline fgsm_rs --alpha 16",
    "paper": "--mixup-alpha 1 --kl-weight 1 --temperature 1 --delta-init half --attack-mode train",
    "late": f"{BOTH} --attack-mode train --lr-peak 0.4",
}
ABLATION = (
    "mixup", "kl0", "kl", "kl4", "kl1to4", "kl4ramp", "kl1to4t1", "ta1", "t4", "t4to1", "t1",
    "n_both", "eval1", "paper",
)  # fmt: skip
LONG = "--width 16 --train-images 4000 --epochs 110 --batch-size 64 --measure-every 10"
SHORT = "--width 16 --epochs 15 --lr-schedule cyclic --lr 0.2 --measure-every 5"
LATE = f"{SHORT} {METHODS['late']}"
FAST = "--preset fast --width 16 --measure-every 7"
STEEP = (
    "--width 16 --train-images 25000 --epochs 6 --lr-schedule cyclic --lr 0.2 --lr-peak 0.1 "
    "--epsilon 16"
)
STEEP15_PARTS = (
    "kl0", "kl", "kl4", "kl1to4", "kl4ramp", "kl1to4t1", "paper", "rs_both", "n_both", "eval0",
    "eval1", "train8",
)  # fmt: skip
STEEP15 = f"{STEEP} --epochs 15 --on-collapse stop"  # a dead network is not trained further
LONG16 = f"{LONG} --measure-every 5 --epsilon 16"
HEADLINE = "--attacks clean pgd-50-10 cw-50"
PGD_CW = "--attacks clean pgd-50 cw-50"
CHOICES = ("kl1to4", "kl", "kl4", "kl1to4t1", "both")  # the defaults, and what they might have been
CHOSEN = {"held-out": "--attacks clean cw-50 --held-out --n-examples 3000"}  # between these
LONGER = {"whole": "--attacks clean cw-50"} | {
    name: f"--attacks clean {name} --n-examples 1000 --batch-size 200"
    for name in ("apgd", "autoattack")
}


@dataclass(frozen=True)
class Cell:
    """One training and its measurements."""

    name: str  # of its folder
    train: str  # flags of the training script
    measure: str  # flags of the measuring script
    files: tuple[str, ...] = ("final",)  # which checkpoints are measured
    classes: int = 10
    more: dict[str, str] = field(default_factory=dict)  # longer measurements, and their flags


def cpu() -> list[Cell]:
    """Return the cells that two cores carry, the most telling ones first."""
    cells = [
        Cell(f"steep-{method}-seed{seed}", f"{STEEP} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon 16 --n-examples 1000")
        for seed in range(5)
        for method in ("both", "train8", "fgsm_rs", "n_fgsm", "train", "fgsm_rs16")
    ]  # fmt: skip
    cells += [
        Cell(f"steep15-{method}-seed{seed}", f"{STEEP15} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon 16 --n-examples 1000")
        for seed in range(5)
        for method in ("both", "fgsm_at", "fgsm_rs", "n_fgsm", *STEEP15_PARTS)
    ]  # fmt: skip
    cells += [
        Cell(f"long16-{method}-seed{seed}", f"{LONG16} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon 16 --n-examples 1000")
        for seed in range(5)
        for method in ("both", "train8", "fgsm_rs", "n_fgsm", "kl1to4", "kl", "eval0")
    ]  # fmt: skip
    cells += [
        Cell(f"long-{method}-seed{seed}", f"{LONG} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --n-examples 2000", ("final", "best"),
             more=(CHOSEN if method in CHOICES else {}) | LONGER)
        for methods in (
            ("both", "n_fgsm", "fgsm_rs", "fgsm_at", "train", "eval0"), ABLATION, ("pgd_at",)
        )
        for seed in range(3) for method in methods
    ]  # fmt: skip
    cells += [
        Cell(f"long{eps}-{method}-seed{seed}",
             f"{LONG} --epsilon {eps} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon {eps} --n-examples 2000", ("final", "best"))
        for seed in range(3) for eps in (12, 4)
        for method in ("kl1to4", "n_fgsm", "fgsm_rs")
    ]  # fmt: skip
    cells += [
        Cell(f"short-{method}-seed{seed}", f"{SHORT} {METHODS[method]} --seed {seed}", PGD_CW)
        for seed in range(2)
        for method in (
            "both", "kl0", "kl", "kl4", "kl1to4", "kl4ramp", "kl1to4t1", "n_fgsm", "fgsm_rs",
            "train", "eval0", "late",
        )
    ]  # fmt: skip
    cells += [Cell(f"fast-preset-seed{seed}", f"{FAST} --seed {seed}", PGD_CW) for seed in range(2)]
    cells += [
        Cell(f"precision-{precision}-seed{seed}",
             f"{LATE} --train-images 10000 --precision {precision} --seed {seed}",
             f"{PGD_CW} --n-examples 2000")
        for seed in range(3) for precision in ("bf16", "fp32")
    ]  # fmt: skip
    return cells + [
        Cell(f"short100-{method}-seed{seed}", f"{SHORT} {METHODS[method]} --seed {seed}", PGD_CW,
             classes=100)
        for seed in range(2) for method in ("both", "kl", "kl4", "kl1to4", "n_fgsm", "fgsm_rs")
    ]  # fmt: skip


def gpu() -> list[Cell]:
    """Return the full-scale cells: two networks, two data sets, two schedules, two epsilons."""
    schedules = {
        "110": "--epochs 110 --lr-schedule multistep --lr 0.1",
        "30": "--epochs 30 --lr-schedule cyclic --lr 0.2",
    }
    wide = "--model WideResNet34-10"
    cells = [
        Cell(f"gpu-{classes}-{model}-{epochs}-eps{eps}-{method}-seed{seed}",
             f"--model {model} {schedules[epochs]} --epsilon {eps} {METHODS[method]} --seed {seed}",
             f"{PGD_CW} --epsilon {eps} --batch-size 1000 --n-examples 2000", ("final", "best"),
             classes, {"autoattack": f"{HEADLINE} autoattack --epsilon {eps} --batch-size 1000"})
        for seed in range(3) for model in ("PreActResNet18", "ResNet18")
        for epochs in ("110", "30") for classes in (10, 100) for eps in (8, 16)
        for method in ("kl1to4", "n_fgsm", "both", "kl", "kl4", "fgsm_rs")
    ]  # fmt: skip
    return cells + [
        Cell(f"gpu-{classes}-wide-30-eps8-kl1to4-seed0",
             f"{wide} {schedules['30']} {METHODS['kl1to4']}",
             f"{HEADLINE} autoattack --batch-size 500", classes=classes)
        for classes in (10, 100)
    ]  # fmt: skip


SCALES = {"cpu": cpu, "gpu": gpu}
