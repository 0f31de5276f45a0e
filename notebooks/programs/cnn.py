"""A convolutional network reads scikit-learn's digits: channels_last, mixed precision, and stochastic weight averaging
over the last third of the run, with statistics of BatchNorm gathered anew for the average.

python notebooks/programs/cnn.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel

import hbfunc


def network(width: int) -> nn.Sequential:
    """[batch, 1, 8, 8] images to ten logits."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, width), *block(width, width), nn.MaxPool2d(2), *block(width, 2 * width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def main(argv: list[str] | None = None) -> float:
    """Train as told; the accuracy of the average on the validation images."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=15, help="(default: 15)")
    p.add_argument("--width", type=int, default=32, help="channels (default: 32)")
    p.add_argument("--batch", type=int, default=64, help="(default: 64)")
    p.add_argument("--lr", type=float, default=3e-3, help="(default: 0.003)")
    p.add_argument("--device", default="cpu", help="(default: cpu)")
    args = p.parse_args(argv)
    device = torch.device(args.device)

    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    x, y = x.to(device, memory_format=torch.channels_last), torch.from_numpy(labels).to(device)
    order = torch.randperm(len(y)).to(device)
    train, valid = order[:1257], order[1257:]

    model = network(args.width).to(device, memory_format=torch.channels_last)
    optimizer = hbfunc.SOAP(model.parameters(), lr=args.lr)
    averaged = AveragedModel(model)
    averaging = 2 * args.epochs // 3  # the first epoch that is
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, averaging))
    constant = SWALR(optimizer, swa_lr=args.lr / 3, anneal_epochs=2)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")  # float16 needs it, bfloat16 does not
    precision = torch.float16 if device.type == "cuda" else torch.bfloat16

    def accuracy(net: nn.Module) -> float:
        net.eval()
        with torch.no_grad():
            right = (net(x[valid]).argmax(-1) == y[valid]).float().mean().item()
        net.train()
        return right

    def batches() -> list[Tensor]:
        shuffled = train[torch.randperm(len(train)).to(device)]
        return list(shuffled.split(args.batch)[:-1])  # each of one size: another would be another graph

    for epoch in range(args.epochs):
        for rows in batches():
            with torch.autocast(device.type, precision):
                loss = F.cross_entropy(model(x[rows]), y[rows])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if epoch >= averaging:
            averaged.update_parameters(model)
            constant.step()
        else:
            cosine.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {accuracy(model):.2%}", flush=True)

    hbfunc.recompute_batchnorm(averaged, [x[rows] for rows in batches()])
    final = accuracy(averaged)
    print(f"average of the last {args.epochs - averaging} epochs: {final:.2%}")
    return final


if __name__ == "__main__":
    main()
