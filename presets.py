"""What ``--baseline`` and ``--preset`` stand for: settings of the other flags, not other code."""

PLAIN = dict(
    mixup_alpha=0.0, temperature=(1.0, 1.0), kl_weight=(0.0, 0.0), label_smoothing=0.0,
    attack_mode="train",
)  # fmt: skip
# Baselines are settings of the same flags, their authors' choices; alpha_ratio is the default of
# --alpha over --epsilon.
BASELINES = {
    "fgsm_at": PLAIN | dict(delta_init="zero"),
    "fgsm_rs": PLAIN | dict(delta_init="uniform", alpha_ratio=1.25),
    "n_fgsm": PLAIN | dict(delta_init="noise"),
    "pgd_at": PLAIN | dict(delta_init="uniform", attack_steps=10, alpha_ratio=0.25),
    "trades": PLAIN | dict(
        delta_init="uniform", attack_steps=10, alpha_ratio=0.25, attack_target="clean",
        hard_term="clean", kl_weight=(6.0, 6.0), kl_reference="clean", kl_gradient="both",
        attack_mode="eval",
    ),
}  # fmt: skip
PRESETS = {
    "fast": dict(
        epochs=13, image_sizes=[16, 16, 24, 32], crop_padding=1, mixup_alpha=0.0,
        kl_weight=(0.0, 0.0), delta_init="noise", lr_schedule="cyclic", lr=0.2, lr_peak=0.2,
        nesterov=True, ema_decay=0.99, attack_mode="train",
    ),
}  # fmt: skip


def settings(preset: str | None, baseline: str | None) -> dict[str, object]:
    """Return the flags that both set; a baseline's method comes before a preset's."""
    return PRESETS.get(preset, {}) | BASELINES.get(baseline, {})
