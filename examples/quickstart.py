"""Two in five labels of scikit-learn's digits are made wrong. Plain training and FSR, side by side, in seconds.

    python examples/quickstart.py

The images come with scikit-learn, so nothing is downloaded. The two runs have the same images, wrong labels, initial
weights and batches. What FSR needs is marked 1, 2, 3.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fsr_wrap import FSRWrapper, with_index

EPOCHS, BATCH_SIZE, TEST = 40, 32, 500


def make_data(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Training images (1297, 64), their given and their right labels, test images (500, 64) and their labels."""
    digits = load_digits()
    images, right = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(images), generator=generator).tensor_split([-TEST])
    other = (right + torch.randint(1, 10, right.shape, generator=generator)) % 10
    given = torch.where(torch.rand(right.shape, generator=generator) < noise, other, right)
    return images[train], given[train], right[train], images[test], right[test]


def train(images: Tensor, given: Tensor, test: Tensor, answers: Tensor, with_fsr: bool, seed: int) -> list[float]:
    """Test accuracy after each epoch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train_set = with_index(TensorDataset(images, given))  # 1
    loader = DataLoader(train_set, batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    fsr = FSRWrapper(model, optimizer, dataset=train_set) if with_fsr else None  # 2
    accuracy = []
    for _ in range(EPOCHS):
        for x, y, index in loader:
            logits = model(x)
            loss = F.cross_entropy(logits, y) if fsr is None else fsr.loss(logits, y, index)  # 3
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            accuracy.append((model(test).argmax(1) == answers).float().mean().item())
    return accuracy


def main() -> None:
    """Trains both and prints accuracy by epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.4, help="the share of wrong labels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.noise <= 1:
        parser.error(f"--noise {args.noise}: give a share from 0 to 1")
    torch.set_num_threads(1)  # the network is too small for more
    images, given, right, test, answers = make_data(args.noise, args.seed)
    wrong = (given != right).float().mean()
    print(f"{len(images)} training images, {wrong:.0%} of the labels wrong; {len(test)} test images, labels right")
    curves = []
    for with_fsr in (False, True):
        start = time.perf_counter()
        curves.append(train(images, given, test, answers, with_fsr, args.seed))
        print(f"{'FSR' if with_fsr else 'cross-entropy'}: {time.perf_counter() - start:.1f} s")
    print("\ntest accuracy\nepoch  cross-entropy    FSR")
    for epoch in range(4, EPOCHS, 5):
        print(f"{epoch + 1:>5}  {curves[0][epoch]:>13.3f}  {curves[1][epoch]:>5.3f}")


if __name__ == "__main__":
    main()
