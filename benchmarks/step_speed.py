"""Seconds of one training step: MIX-KL against the loops of two fast adversarial trainings.

    python benchmarks/step_speed.py
    python benchmarks/step_speed.py --model WideResNet34-10 --batch-size 8

The peers are written here anew, after what their authors' code does (fast_adversarial's FGSM-RS and
the prior-guided FGSM-MEP): fp32, NCHW, whole backward pass in the attack, values read back in each
step. Ours is the whole step of ``engine.py`` with augmentation, Mixup, KL and averaging; the peers
get their batch ready-made. All share process, network, images and batch; they run in turn, and with
them a product of large matrices in each precision: the rate that the machine gives at best.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timing import Flops, interleaved, matrix_product, parser, show

import attacks
import data
import engine
import options
import schedules
import utils
from models import build_model

EPS = 8 / 255


def fgsm_rs(model, x, y):
    """Return a step of FGSM-RS as fast_adversarial takes it: 6F and eight reads."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    epsilon = torch.full((3, 1, 1), EPS, device=x.device)
    totals = [0.0, 0]

    def step():
        delta = torch.zeros_like(x)
        for channel in range(3):
            size = epsilon[channel][0][0].item()
            delta[:, channel].uniform_(-size, epsilon[channel][0][0].item())
        delta = torch.max(torch.min(delta, 1 - x), -x).requires_grad_()
        F.cross_entropy(model(x + delta), y).backward()
        moved = torch.max(torch.min(delta + 1.25 * epsilon * delta.grad.sign(), epsilon), -epsilon)
        delta = torch.max(torch.min(moved, 1 - x), -x).detach()
        logits = model(x + delta)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals[0] += loss.item() * len(y)
        totals[1] += (logits.max(1)[1] == y).sum().item()

    return step


def prior_guided(model, x, y):
    """Return a step of FGSM-MEP as its authors take it: 8F, through both graphs."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
    labels = torch.full((len(y), 10), 0.3 / 9, device=x.device).scatter_(1, y[:, None], 0.7)
    prior = torch.empty_like(x).uniform_(-EPS, EPS)
    totals = [0.0, 0]

    def smoothed(logits):
        return -(labels * logits.log_softmax(1)).sum(1).mean()

    def step():
        nonlocal prior
        delta = prior.clone().requires_grad_()
        start = model(x + delta)
        smoothed(start).backward(retain_graph=True)
        delta = (delta + EPS * delta.grad.sign()).clamp(-EPS, EPS)
        prior = delta = torch.max(torch.min(delta, 1 - x), -x).detach()
        logits = model(x + delta)
        loss = smoothed(logits) + 10 * F.mse_loss(logits, start)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals[0] += loss.item() * len(y)
        totals[1] += (logits.max(1)[1] == y).sum().item()

    return step


def random_images(count, device):
    """Return images and labels drawn at random, the same ones each time."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8)
    return data.Images(pixels, torch.randint(10, (count,))).to(device)


def mix_kl(model, images, precision, *flags):
    """Return a step of ours on ``images``, with the defaults but for ``flags``, and its parts."""
    device, batch_size = images.labels.device, len(images.labels)
    args = options.parse_training(["--batch-size", str(batch_size), *flags], "doc", {})
    args.num_classes, args.dtype = 10, precision
    batches = data.TrainingBatches(images, batch_size)
    attack = partial(attacks.craft, epsilon=EPS, alpha=EPS, start=args.delta_init)
    model = model.to(memory_format=torch.channels_last)
    build, parts = engine.prepare(model, batches, args)
    step = build(attack, data.SIZE)
    index = torch.arange(batch_size, device=device)
    (row,) = torch.tensor(schedules.plan(args, 1, 1, np.random.default_rng(0)), device=device)
    return partial(step, index, row), parts


def main():
    """Time the steps and print the table."""
    made = parser(__doc__, rounds=5)
    made.add_argument("--model", default="PreActResNet18")
    made.add_argument("--width", type=int)
    made.add_argument("--batch-size", type=int, default=128)
    args = made.parse_args()
    device, count = utils.pick_device(args.device), args.batch_size
    images = random_images(count, device)
    x, y = images.as_float().contiguous(), images.labels

    def network():
        return build_model(args.model, num_classes=10, width=args.width).train().to(device)

    default = utils.pick_precision("auto", device)
    steps = {  # and the forward passes in each, which tests count for ours
        "FGSM-RS loop, fp32": (fgsm_rs(network(), x, y), torch.float32, 6),
        "prior-guided loop, fp32": (prior_guided(network(), x, y), torch.float32, 8),
        "MIX-KL, fp32": (mix_kl(network(), images, torch.float32)[0], torch.float32, 5),
        "MIX-KL, default precision": (mix_kl(network(), images, default)[0], default, 5),
    }
    products = {dtype: matrix_product(args.device, dtype) for _, dtype, _ in steps.values()}
    functions = {name: step for name, (step, _, _) in steps.items()}
    functions |= {dtype: product for dtype, (product, _) in products.items()}
    seconds = interleaved(functions, args.rounds, args.device)
    with Flops() as forward, torch.no_grad():
        network()(x)
    rs, prior = list(seconds.values())[:2]
    rows = []
    for name, (_, dtype, passes) in steps.items():
        took, rate = seconds[name], passes * forward.total / seconds[name]
        peak = products[dtype][1] / seconds[dtype]
        rows.append({
            "step": name, "seconds": took, "images/s": count / took, "x FGSM-RS": rs / took,
            "x prior-guided": prior / took, "GFLOP/s": rate / 1e9, "of matrix peak": rate / peak,
        })  # fmt: skip
    width = f" of width {args.width}" if args.width else ""
    show(
        f"one training step, {args.model}{width}, batch {count}, median of {args.rounds}",
        rows,
        args,
    )


if __name__ == "__main__":
    main()
