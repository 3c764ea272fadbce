"""The command line: its flags are frozen, both spellings work, and mistakes get one line."""

import argparse
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import options
import presets
import values

TRAINING = """EMA_value allow_changed alpha attack_mode attack_steps attack_target
attack_temperature baseline batch_size compile crop_padding data_dir debug delta_init device
early_stop ema_decay epochs epsilon factor hard_term held_out help image_sizes kl_gradient
kl_reference kl_warmup kl_weight label_smoothing lamda lr lr_min lr_peak lr_schedule measure_every
mixup_alpha model momentum nesterov on_collapse out_dir overwrite precision preset resume run_name
save_every seed synthetic temperature train_images weight_decay width"""
MEASURING = """attacks batch_size cascade compare data_dir debug device eps epsilon export held_out
help model model_path n_examples normalize out_dir pictures seed synthetic transfer_from weights
width"""
PUBLISHED = """--batch-size 128 --data-dir d --epochs 110 --lr-schedule cyclic --lr-min 0.0
--lr-max 0.2 --weight-decay 5e-4 --momentum 0.9 --model ResNet18 --epsilon 8 --alpha 8 --delta-init
half --out_dir o --seed 0 --lamda 12 --early-stop --factor 0.7 --mixup-alpha 1.0 --EMA_value 0.82
--temperature 1.0"""


def parse(words, defaults=None):
    return options.parse_training(words.split(), "doc", defaults or {})


def test_the_help_names_every_default():
    for parser in (options.training_parser("doc", {}), options.measuring_parser("doc")):
        for action in parser._actions:
            if action.default in (None, False, argparse.SUPPRESS):
                continue
            value = action.default
            if isinstance(value, tuple):
                value = ":".join(f"{end:g}" for end in dict.fromkeys(value))
            elif isinstance(value, (list, float)):
                value = value[0] if isinstance(value, list) else f"{value:g}"
            shown = parser._get_formatter()._expand_help(action)
            assert re.search(rf"default:? {value}\b", shown), action.option_strings


def test_the_flags_are_frozen():
    for parser, flags in (
        (options.training_parser("doc", {}), TRAINING),
        (options.measuring_parser("doc"), MEASURING),
    ):
        assert sorted(action.dest for action in parser._actions) == flags.split()


def test_every_flag_of_the_published_scripts_is_accepted(capsys):
    args = parse(PUBLISHED)
    shown = capsys.readouterr().err
    assert "note: --lamda has no effect; --kl-weight" in shown
    assert "note: --EMA-value has no effect; --ema-decay" in shown
    assert "note: --early-stop has no effect; --on-collapse stop replaces it\n" in shown
    assert (args.batch_size, args.epochs, args.lr, args.lr_min) == (128, 110, 0.2, 0.0)
    assert (args.epsilon, args.alpha, args.factor, args.on_collapse) == (8, 8, 0.7, "warn")
    assert (args.mixup_alpha, args.temperature, args.lr_schedule) == (1.0, (1.0, 1.0), "cyclic")


def test_dashes_and_underscores_are_the_same_flag_and_values_are_left_alone():
    assert parse("--out_dir a_b --lr-max=0.3") == parse("--out-dir a_b --lr_max=0.3")
    assert str(parse("--out_dir my_out").out_dir) == "my_out"
    assert options.dashed(["--a_b=c_d", "e_f", "-x_y"]) == ["--a-b=c_d", "e_f", "-x_y"]


@pytest.mark.parametrize("text, value", [
    ("8", 8), ("8/255", 8), ("0.5/255", 0.5), ("0.03137", 7.99935), ("0", 0),
    ("16/255", 16), ("1", 1), ("255", 255),
])  # fmt: skip
def test_sizes_are_in_units_of_1_255(text, value):
    assert values.pixels(text) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("words, message", [
    ("--epsilon -1", "argument --epsilon"),
    ("--epsilon 256", "not in [0, 255]"),
    ("--epsilon nan", "not in [0, 255]"),
    ("--epsilon 8/0", "not in [0, 255]"),
    ("--epsilon x", "invalid pixels value"),
    ("--epsilon 0.5", "0.5: write 0.5/255, or 127.5/255"),
    ("--epochs 0", "argument --epochs: 0: outside"),
    ("--epochs 1.5", "argument --epochs"),
    ("--image-sizes 4 32", "argument --image-sizes: 4: outside"),
    ("--measure-every 0", "argument --measure-every: 0: outside"),
    ("--lr inf", "argument --lr"),
    ("--lr nan", "argument --lr"),
    ("--temperature 0", "temperatures are above 0"),
    ("--temperature 2:nan", "temperatures are above 0"),
    ("--kl-weight 1:-1", "weights are 0 or more"),
    ("--kl-weight inf", "weights are 0 or more"),
    ("--kl-weight 1:2:3", "invalid weights value"),
    ("--ema-decay 1", "outside"),
    ("--baseline madry", "invalid choice"),
    ("--delta-init random", "'zero', 'uniform', 'half', 'noise'"),
    ("--unknown 3", "unrecognized arguments: --unknown"),
    ("--epo 3", "unrecognized arguments"),
    ("--mixup-alpha -1", "argument --mixup-alpha"),
])  # fmt: skip
def test_a_bad_value_is_one_line_and_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(words)
    shown = capsys.readouterr().err
    assert (
        exit_.value.code == 2
        and len(shown.splitlines()) == 1
        and message in shown.replace('"', "'")
    )


@pytest.mark.parametrize("words, message", [
    ("--kl-reference ema --ema-decay 0", "--kl-reference ema: needs an --ema-decay"),
    ("--attack-target clean --delta-init zero", "--attack-target clean: its gradient"),
    ("--hard-term clean", "--hard-term clean: with --kl-reference start no term sees the half"),
    ("--nesterov --momentum 0", "--nesterov: needs a --momentum"),
    ("--lr-schedule multistep --lr-peak 0.4", "--lr-peak: multistep has none"),
    ("--kl-weight 0 --temperature 4 --attack-temperature 1", "only --attack-temperature counts"),
    ("--image-sizes 32 16", "--image-sizes: the last is 32"),
    ("--image-sizes 16 24 32 --epochs 2", "--epochs 2: 3 --image-sizes need more, or as many"),
    ("--preset fast --epochs 3", "--epochs 3: 4 --image-sizes"),
    ("--kl-gradient both", "--kl-gradient both: needs --kl-reference clean"),
    ("--baseline trades --kl-weight 0", "--hard-term clean: with --kl-weight 0 no adversarial"),
    ("--factor 0.7 --label-smoothing 0.1", "--factor: sets --label-smoothing"),
    ("--factor 0 --label-smoothing 0.1", "--factor: sets --label-smoothing"),
    ("--attack-steps 2", "--attack-steps: nothing keeps several steps from --delta-init noise"),
    ("--baseline pgd_at --delta-init noise", "--attack-steps: nothing keeps several steps"),
    ("--overwrite", "--overwrite: replaces the run called --run-name"),
    ("--overwrite --run-name a --resume", "--overwrite: starts anew, --resume goes on"),
    ("--allow-changed", "--allow-changed: needs --resume"),
    ("--lr 0.1 --lr-min 0.2", "--lr-min 0.2: above --lr 0.1"),
    ("--kl-weight 0 --kl-warmup 0.1", "--kl-warmup: with --kl-weight 0 there is nothing"),
    ("--preset fast --kl-warmup 0.1", "--kl-warmup: with --kl-weight 0 there is nothing"),
    ("--baseline n_fgsm --kl-reference ema", "--kl-reference: with --kl-weight 0 no term"),
    ("--kl-weight 0 --kl-reference clean --kl-gradient both", "--kl-reference: with --kl-weight 0"),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse(words)


def test_a_flag_of_the_kl_term_is_refused_only_where_it_was_given_and_the_weight_is_0():
    parse("--baseline trades --kl-weight 0 --hard-term adversarial")  # its own reference is clean
    parse("--kl-weight 0:4 --kl-warmup 0.1 --kl-reference clean --kl-gradient both")
    parse("--kl-weight 0 --kl-warmup 0 --lr 0")


@pytest.mark.parametrize("baseline, alpha, start, steps", [
    ("fgsm_at", 12, "zero", 1), ("fgsm_rs", 15, "uniform", 1), ("n_fgsm", 12, "noise", 1),
    ("pgd_at", 3, "uniform", 10), ("trades", 3, "uniform", 10),
])  # fmt: skip
def test_baselines_are_settings_that_explicit_flags_override(baseline, alpha, start, steps):
    table = {"mixup_alpha": 0.3, "kl_weight": (9.0, 9.0)}
    args = parse(f"--baseline {baseline} --epsilon 12", table)
    assert (args.alpha, args.delta_init, args.attack_steps) == (alpha, start, steps)
    assert args.mixup_alpha == 0 and args.attack_temperature == args.temperature == (1.0, 1.0)
    weight = 6 if baseline == "trades" else 0
    assert args.kl_weight == (weight, weight) and args.method == baseline
    changed = parse(f"--baseline {baseline} --epsilon 12 --alpha 5 --mixup-alpha 0.7")
    assert (changed.alpha, changed.mixup_alpha) == (5, 0.7)


def test_baselines_attack_on_the_statistics_that_their_authors_attack_on():
    modes = [parse(f"--baseline {name}").attack_mode for name in presets.BASELINES]
    assert modes == ["train", "train", "train", "train", "eval"]
    assert parse("--baseline n_fgsm --attack-mode eval").attack_mode == "eval"
    assert parse("").attack_mode == "both" and parse("--preset fast").attack_mode == "train"


def test_a_preset_comes_before_the_script_and_after_baseline_and_explicit_flags():
    fast = parse("--preset fast", {"epochs": 110, "kl_weight": (9.0, 9.0)})
    assert fast.image_sizes[-1] == 32 and fast.epochs < 15
    assert fast.image_sizes[0] < 32 and parse("").image_sizes == [32]
    assert parse("--preset fast --epochs 5").epochs == 5
    method = dict(mixup_alpha=0, kl_weight=(0, 0), delta_init="noise")
    sizes = dict(image_sizes=[16, 16, 24, 32], crop_padding=1)
    run = dict(epochs=13, lr=0.2, lr_schedule="cyclic", lr_peak=0.2, nesterov=True, ema_decay=0.99)
    assert vars(fast) | method | run | sizes == vars(parse("--preset fast"))
    assert (fast.method, parse("").method) == ("fast", "mix_kl")  # it names the run's folder
    trades = parse("--preset fast --baseline trades")
    assert (trades.kl_weight, trades.epochs) == ((6, 6), fast.epochs)
    assert trades.method == "trades"


def test_the_table_of_a_script_sets_defaults_and_knows_no_other_name():
    assert parse("", {"lr": 0.7}).lr == 0.7 and parse("--lr 0.2", {"lr": 0.7}).lr == 0.2
    with pytest.raises(KeyError, match="no flag sets learning_rate"):
        parse("", {"learning_rate": 0.7})


def test_each_part_of_the_method_has_a_flag_that_turns_it_off():
    args = parse("--mixup-alpha 0 --temperature 1 --kl-weight 0")
    assert (args.mixup_alpha, args.kl_weight) == (0, (0, 0))
    assert args.temperature == args.attack_temperature == (1.0, 1.0)
    assert parse("--temperature 4:1 --attack-temperature 3").attack_temperature == (3.0, 3.0)


@pytest.mark.parametrize(
    "name", ["MIX_KL_CIFAR10", "MIX_KL_CIFAR100", "test_cifar10", "test_cifar100"]
)
def test_scripts_do_nothing_at_import_and_print_help_without_torchvision(name):
    program = (
        "import sys, runpy; sys.modules['torchvision'] = None; sys.modules['matplotlib'] = None\n"
        f"sys.argv = ['{name}.py', '--help']; sys.path.insert(0, '.')\n"
        f"import {name}; runpy.run_path('{name}.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:") and re.search(r"--data-dir DIR", done.stdout)


def test_errors_of_the_user_are_one_line_and_debug_shows_the_traceback(script):
    status, _, err = script("MIX_KL_CIFAR10", "--model", "VGG")
    assert status == 2 and len(err.splitlines()) == 1 and "choose one of PreActResNet18" in err
    with pytest.raises(ValueError, match="VGG"):
        script("MIX_KL_CIFAR10", "--model", "VGG", "--debug")


def test_an_interrupt_ends_with_status_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as exit_:
        options.run(interrupted)
    assert exit_.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("name", ["MIX_KL_CIFAR10", "MIX_KL_CIFAR100"])
def test_the_scripts_tables_are_made_of_flags(name):
    module = importlib.import_module(name)
    args = options.parse_training([], "doc", module.DEFAULTS)
    assert all(getattr(args, key) == value for key, value in module.DEFAULTS.items())
    lr, schedule = (0.1, "multistep") if name.endswith("10") else (0.2, "cyclic")
    assert (args.lr, args.lr_schedule, args.lr_peak) == (lr, schedule, 0.01)
    assert (args.mixup_alpha, args.temperature, args.kl_weight) == (0, (2, 2), (1, 4))
    assert (args.delta_init, args.kl_reference, args.epsilon, args.alpha) == (
        "noise",
        "start",
        8,
        8,
    )
    assert (args.epochs, args.batch_size, args.ema_decay) == (110, 128, 0.999)
