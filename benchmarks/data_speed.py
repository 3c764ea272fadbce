"""Images a second of the data pipeline: crops and flips gathered in batches, against torchvision's.

    python benchmarks/data_speed.py

One thread each: random crop (pad 4), flip and scaling to [0, 1], ready for a network. Torchvision's
is the pipeline that the peers use: a PIL image at a time, stacked into a batch. On a CPU the
seconds are those of the thread itself, so that other work on the machine does not count.
"""

import time

import numpy as np
import torch
from timing import interleaved, parser, show

import data
import utils


def main():
    """Time both pipelines and print the table."""
    from torchvision import transforms

    made = parser(__doc__, rounds=5)
    made.add_argument("--batch-size", type=int, default=128)
    args = made.parse_args()
    torch.set_num_threads(1)
    utils.keep_freed_memory()  # as the training scripts do
    pixels = torch.randint(256, (4 * args.batch_size, 32, 32, 3), dtype=torch.uint8)
    images = data.Images(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    batches = data.TrainingBatches(images.to(utils.pick_device(args.device)), args.batch_size)
    order = batches.shuffled(np.random.default_rng(0))
    each = transforms.Compose([
        transforms.ToPILImage(), transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ])  # fmt: skip
    arrays = pixels.numpy()
    pipelines = {
        "torchvision, image by image": lambda: [
            torch.stack([each(arrays[i]) for i in index]) for index in order.tolist()
        ],
        "ours, batch by batch": lambda: [batches.load(index) for index in order],
    }
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    seconds = interleaved(pipelines, args.rounds, args.device, clock)
    slow = max(seconds.values())
    rows = [
        {"pipeline": name, "images/s": len(pixels) / value, "ratio": slow / value}
        for name, value in seconds.items()
    ]
    show(f"data pipeline, batch {args.batch_size}, one thread, median of {args.rounds}", rows, args)


if __name__ == "__main__":
    main()
