"""Every flag, declared once, in groups; both spellings (dashes, underscores) are accepted."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import parallel
import presets
from values import count, number, pixels, temperatures, weights

DEFAULT_ATTACKS = ["clean", "fgsm", "pgd-10", "pgd-20", "pgd-50", "cw-20", "cw-50"]
REPLACED = {  # flags of the published scripts that others replace here
    "--lamda": "--kl-weight (the published quotient is no divergence: other numbers fit)",
    "--EMA-value": "--ema-decay (the average is updated at every step, without a gate)",
    "--early-stop": "--on-collapse stop",
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> None:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def dashed(argv: list[str]) -> list[str]:
    """Return the arguments with dashes for underscores in the names of flags, not in values."""
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(name.replace("_", "-") + equals + value if word.startswith("--") else word)
    return words


# fmt: off
def add_shared(parser: Parser) -> None:
    """Add the flags that training and measuring have in common."""
    add = parser.add_argument_group("data and machine").add_argument
    add("--data-dir", type=Path, default=Path("cifar-data"), metavar="DIR",
        help="folder of the unpacked official python archive (default %(default)s)")
    add("--synthetic", action="store_true", help="use the built-in synthetic images (no files)")
    add("--out-dir", type=Path, default=Path("output"), metavar="DIR",
        help="where results go (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default %(default)s)")
    add("--seed", type=count(0), default=0, help="of every random choice (default %(default)s)")
    add("--debug", action="store_true", help="show the traceback of an error")


def add_method(parser: Parser) -> None:
    """Add the flags of the method and of the attack inside it."""
    add = parser.add_argument_group("method").add_argument
    add("--baseline", choices=presets.BASELINES,
        help="train another method instead: settings of the flags below")
    add("--preset", choices=presets.PRESETS,
        help="fast: 13 epochs on images that grow from 16 to 32 pixels, without Mixup and KL")
    add("--mixup-alpha", type=number(0), default=0.0, metavar="A",
        help="Mixup with lam ~ Beta(A, A); 0 is none (default %(default)s)")
    add("--temperature", type=temperatures, default=(2.0, 2.0), metavar="T",
        help="T of the KL term: 2, or 4:1 for a line over the run (default 2)")
    add("--attack-temperature", type=temperatures, metavar="T",
        help="T of the attack (default: that of --temperature)")
    add("--kl-weight", type=weights, default=(1.0, 4.0), metavar="W",
        help="weight of the KL term: 1, or 1:4 for a line over the run; 0 is none (default 1:4)")
    add("--kl-warmup", type=number(0, 1), default=0.0, metavar="P", help="part of the run over "
        "which it is faded in from 0; --attack-mode eval wants one (default %(default)s)")
    add("--kl-reference", choices=("start", "clean", "ema"), default="start",
        help="KL to the logits of the attack's start, of the unperturbed image, or of the averaged "
        "weights there (default %(default)s)")
    add("--kl-gradient", choices=("student", "both"), default="student",
        help="whether a clean reference gets a gradient too, as in TRADES (default %(default)s)")
    add("--hard-term", choices=("adversarial", "clean"), default="adversarial",
        help="images of the cross-entropy term (default %(default)s)")
    add("--label-smoothing", type=number(0, 1), default=0.0, metavar="S",
        help="share of each label spread over all classes (default %(default)s)")
    add("--factor", type=number(0, 1), metavar="F", help="label relaxation as in the published "
        "scripts: sets --label-smoothing to (1 - F) K / (K - 1)")
    add("--ema-decay", type=number(0, 0.999999), default=0.999, metavar="D",
        help="decay of the weight average; 0 is none (default %(default)s)")
    add = parser.add_argument_group("attack of the training step [sizes in 1/255]").add_argument
    add("--epsilon", type=pixels, default=8.0, metavar="E", help="8, 8/255 or 0.03137 (default 8)")
    add("--alpha", type=pixels, metavar="A", help="step size (default: epsilon; 1.25 epsilon for "
        "fgsm_rs, epsilon / 4 for pgd_at and trades)")
    add("--attack-steps", type=count(), default=1, metavar="K", help="1 is FGSM (default 1)")
    add("--delta-init", choices=("zero", "uniform", "half", "noise"), default="noise",
        help="start: 0, U(-E, E), +-E/2, or U(-2E, 2E) unprojected (default %(default)s)")
    add("--attack-target", choices=("labels", "clean"), default="labels",
        help="raise the KL to the labels, or to the clean prediction as TRADES does (default "
        "%(default)s)")
    add("--attack-mode", choices=("eval", "train", "both"), default="both",
        help="batch norm of the attack: running statistics, the batch's, or half of the images "
        "each, with the KL to the start on the latter's half (default %(default)s; train for "
        "--preset fast and the baselines, eval for trades)")
    parser.set_defaults(alpha_ratio=1.0)


def add_optimisation(parser: Parser) -> None:
    """Add the flags of the network and of its optimiser."""
    add = parser.add_argument_group("network and optimisation").add_argument
    add("--model", default="PreActResNet18",
        help="network (default %(default)s; an unknown name lists all)")
    add("--width", type=count(high=1024), metavar="C",
        help="channels of a ResNet's first stage, a multiple of 8 (default 64)")
    add("--epochs", type=count(), default=110, help="passes over the images (default %(default)s)")
    add("--image-sizes", type=count(8, 32), nargs="+", default=[32], metavar="PIXELS",
        help="side of the training images in equal parts of the run, the last is 32: 16 24 32 is "
        "progressive resizing (default: 32 throughout)")
    add("--crop-padding", type=count(0, 32), default=4, metavar="PIXELS",
        help="border that random crops reach into; 0: no crops (default %(default)s)")
    add("--batch-size", type=count(2), default=128,
        help="images a step, of all processes together (default %(default)s)")
    add("--lr", "--lr-max", type=number(0), default=0.1, help="highest rate (default %(default)s)")
    add("--lr-min", type=number(0), default=0.0, help="lowest, where there is one (default 0)")
    add("--lr-schedule", choices=("multistep", "cyclic", "onecycle", "cosine", "constant"),
        default="multistep", help="multistep: a tenth from 99/110 of the run on, a hundredth from "
        "104/110; cyclic: a triangle (default %(default)s)")
    add("--lr-peak", type=number(0.001, 0.999), default=0.01, metavar="P",
        help="part of the run at which cyclic and onecycle peak (default %(default)s)")
    add("--momentum", type=number(0, 1), default=0.9, help="of SGD (default %(default)s)")
    add("--nesterov", action=argparse.BooleanOptionalAction, default=False,
        help="Nesterov's form of momentum (default: not)")
    add("--weight-decay", type=number(0), default=5e-4, help="of SGD (default %(default)s)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
        help="of training; auto: bf16 where it is faster. Measuring is always fp32 (default "
        "%(default)s)")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="the training step as one CUDA graph; auto: on a single GPU (default %(default)s)")


def add_run(parser: Parser) -> None:
    """Add the flags of the run: its folder, its images, when it stops."""
    add = parser.add_argument_group("run").add_argument
    add("--run-name", metavar="NAME",
        help="folder below --out-dir (default: dataset, method and seed, numbered)")
    add("--overwrite", action="store_true", help="replace the run of that name")
    add("--held-out", type=count(), default=1000, metavar="N", help="training images kept aside "
        "for the log and to choose the best epoch (default %(default)s)")
    add("--train-images", type=count(2), metavar="N", help="train on N images (default: all)")
    add("--measure-every", type=count(), default=1, metavar="N",
        help="measure each N-th epoch, and the last (default %(default)s)")
    add("--on-collapse", choices=("warn", "stop", "rollback"), default="warn",
        help="go on, end the run, or go back to the last healthy epoch and on with a gentler "
        "attack, at most 5 times: noise start, then 3/4 of alpha (default %(default)s)")
    add("--resume", nargs="?", const="auto", metavar="PATH", help="go on from the newest whole "
        "state of this run, or start it where there is none; or from the state at PATH")
    add("--allow-changed", action="store_true",
        help="go on although flags that change the mathematics have changed")
    add("--save-every", type=number(0), default=15.0, metavar="MINUTES",
        help="save the state within an epoch as well (default %(default)g)")
    for flag in REPLACED:
        add(flag, nargs="?", const=True, help=argparse.SUPPRESS)


# fmt: on
def training_parser(doc: str, defaults: dict[str, object]) -> Parser:
    """Return the parser of a training script.

    Args:
        doc: Docstring of the script.
        defaults: The script's table: values that replace the defaults here.

    Raises:
        KeyError: The table names a flag that does not exist.
    """
    parser = Parser(description=doc.split("\n\n")[0], allow_abbrev=False)
    for add in (add_method, add_optimisation, add_run, add_shared):
        add(parser)
    if unknown := defaults.keys() - {action.dest for action in parser._actions}:
        raise KeyError(f"no flag sets {min(unknown)}")
    parser.set_defaults(**defaults)
    return parser


def parse_training(argv: list[str], doc: str, defaults: dict[str, object]) -> argparse.Namespace:
    """Return a training run's flags: explicit ones, then the baseline's, preset's and script's.

    Raises:
        ValueError: Two flags contradict each other.
    """
    parser, argv = training_parser(doc, defaults), dashed(argv)
    args = parser.parse_args(argv)
    if args.preset or args.baseline:
        parser.set_defaults(**presets.settings(args.preset, args.baseline))
        args = parser.parse_args(argv)
    for flag, replacement in REPLACED.items():
        if vars(args).pop(flag[2:].replace("-", "_")) is not None:
            parallel.say(f"note: {flag} has no effect; {replacement} replaces it", sys.stderr)
    ratio = vars(args).pop("alpha_ratio")
    args.alpha = args.epsilon * ratio if args.alpha is None else args.alpha
    args.attack_temperature = args.attack_temperature or args.temperature
    args.method = args.baseline or args.preset or "mix_kl"
    refuse(args, parser.get_default)
    return args


def refuse(args: argparse.Namespace, default: Callable[[str], object]) -> None:
    """Raise a ValueError where two flags contradict each other, or one would do nothing."""
    without_kl = max(args.kl_weight) == 0
    rules = (
        (not without_kl and args.kl_reference == "ema" and args.ema_decay == 0,
         "--kl-reference ema: needs an --ema-decay above 0"),
        (args.kl_gradient == "both" and args.kl_reference != "clean",
         "--kl-gradient both: needs --kl-reference clean"),
        (args.hard_term == "clean" and without_kl,
         "--hard-term clean: with --kl-weight 0 no adversarial image is trained on"),
        (without_kl and args.kl_warmup != default("kl_warmup"),
         "--kl-warmup: with --kl-weight 0 there is nothing to fade in"),
        (without_kl and args.temperature not in (default("temperature"), args.attack_temperature),
         "--temperature: with --kl-weight 0 only --attack-temperature counts"),
        (without_kl and args.kl_reference != default("kl_reference"),
         "--kl-reference: with --kl-weight 0 no term has one"),
        (args.attack_steps > 1 and args.delta_init == "noise",
         "--attack-steps: nothing keeps several steps from --delta-init noise in the ball"),
        (args.attack_target == "clean" and args.delta_init == "zero",
         "--attack-target clean: its gradient is 0 there; choose a --delta-init"),
        (args.hard_term == "clean" and args.kl_reference == "start" and args.attack_mode == "both",
         "--hard-term clean: with --kl-reference start no term sees the half of the images whose "
         "attack is in eval mode under --attack-mode both; choose another of the three"),
        (args.factor is not None and args.label_smoothing > 0, "--factor: sets --label-smoothing"),
        (args.image_sizes[-1] != 32,
         "--image-sizes: the last is 32, the side of the images that are measured"),
        (args.epochs < len(args.image_sizes),
         f"--epochs {args.epochs}: {len(args.image_sizes)} --image-sizes need more, or as many"),
        (args.overwrite and not args.run_name, "--overwrite: replaces the run called --run-name"),
        (args.overwrite and args.resume, "--overwrite: starts anew, --resume goes on; choose one"),
        (args.allow_changed and not args.resume, "--allow-changed: needs --resume"),
        (args.nesterov and args.momentum == 0, "--nesterov: needs a --momentum above 0"),
        (args.lr_peak != default("lr_peak") and args.lr_schedule not in ("cyclic", "onecycle"),
         f"--lr-peak: {args.lr_schedule} has none; choose --lr-schedule cyclic or onecycle"),
        (args.lr_min > args.lr, f"--lr-min {args.lr_min:g}: above --lr {args.lr:g}, the highest"),
    )  # fmt: skip
    for wrong, why in rules:
        if wrong:
            raise ValueError(why)


# fmt: off
def measuring_parser(doc: str) -> Parser:
    """Return the parser of a measuring script."""
    parser = Parser(description=doc.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument_group("what to measure").add_argument
    add("--model-path", type=Path, metavar="FILE", help="checkpoint (.pth)")
    add("--attacks", nargs="+", default=DEFAULT_ATTACKS, metavar="NAME",
        help="clean, fgsm, fgsm-rs, pgd-STEPS, pgd-STEPS-RESTARTS, cw-STEPS, transfer, autoattack, "
        "autoattack-plus, apgd (the first two parts), or one part: apgd-ce, apgd-t, fab-t, square "
        f"(default: {' '.join(DEFAULT_ATTACKS)})")
    add("--epsilon", type=pixels, default=8.0, metavar="E",
        help="[1/255]: 8, 8/255 or 0.03137 (default 8)")
    add("--cascade", action="store_true", help="attack only what the attacks before left standing: "
        "accuracies are then cumulative, the worst case is the same, and it is reached sooner")
    add("--n-examples", type=count(), metavar="N", help="the first N images (default: all)")
    add("--held-out", action="store_true", help="measure on training images that the network was "
        "not trained on, to choose flags by, in place of the test images")
    add("--eps", type=pixels, nargs="+", metavar="E",
        help="a sweep: measure at each of these sizes, and draw the curve")
    add("--pictures", action="store_true", help="draw adversarial images, the loss surface, and "
        "how Mixup and temperature make an adversarial image")
    add("--compare", type=Path, nargs="+", metavar="REPORT",
        help="measure nothing; print these reports side by side, with McNemar's test")
    add = parser.add_argument_group("networks").add_argument
    add("--transfer-from", type=Path, metavar="FILE",
        help="checkpoint on which the attack transfer makes its images")
    add("--export", type=Path, metavar="DIR", help="also write the network as RobustBench wants it")
    add("--weights", choices=("raw", "ema"), help="which of the file (default: its selection)")
    add("--model", help="network of a file that does not name it (a bare state dict)")
    add("--width", type=count(), metavar="C", help="its width, where it is a ResNet and not 64")
    add("--normalize", choices=("dataset", "none"),
        help="what the images go through in such a network (default dataset: its statistics)")
    add("--batch-size", type=count(), default=256, help="images at a time (default %(default)s)")
    add_shared(parser)
    return parser


# fmt: on
def parse_measuring(argv: list[str], doc: str) -> argparse.Namespace:
    """Return the flags of a measurement."""
    parser = measuring_parser(doc)
    args = parser.parse_args(dashed(argv))
    if not (args.model_path or args.compare):
        parser.error("the following arguments are required: --model-path")
    return args


def run(main: Callable[[list[str]], None]) -> None:
    """Call ``main``; what the user can mend is one line and exit status 2, or the error's own."""
    argv, status = sys.argv[1:], 0
    try:
        main(argv)
    except (ValueError, OSError) as error:
        if "--debug" in argv:
            raise
        parallel.say(f"error: {error}", sys.stderr)
        status = getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        parallel.say("interrupted", sys.stderr)
        status = 130
    except SystemExit as stop:
        status = stop.code
    parallel.leave(status)
