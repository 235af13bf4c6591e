"""An iterator by hand with `next`, started again where it ends; a user-made optimizer; augmentation with `random` and NumPy."""

import random

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

STEPS = 60
random.seed(1)
np.random.seed(2)
torch.manual_seed(3)


class Waves(Dataset):
    def __init__(self):
        self.rng = np.random.default_rng(4)
        self.served = 0

    def __len__(self):
        return 70

    def __getitem__(self, i):
        self.served += 1
        t = np.linspace(0, 1, 16) + random.random() * 0.1
        wave = np.sin((i % 7 + 1) * 6.28 * t) + 0.1 * np.random.randn(16) + 0.1 * self.rng.standard_normal(16)
        return torch.tensor(wave, dtype=torch.float32) + 0.01 * torch.randn(16), i % 7


class SignDescent(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.flips = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                memory = self.state[p].setdefault("memory", torch.zeros_like(p))
                memory.mul_(0.9).add_(p.grad)
                if (memory.sum() > 0).item():
                    self.flips += 1
                p.add_(memory.sign(), alpha=-group["lr"])


loader = DataLoader(Waves(), batch_size=8, shuffle=True, drop_last=True)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 7))
average = [p.detach().clone() for p in model.parameters()]
opt = SignDescent(model.parameters(), lr=2e-3)
batches = iter(loader)
history = []

for step in range(STEPS):
    try:
        x, y = next(batches)
    except StopIteration:
        batches = iter(loader)
        x, y = next(batches)
    if random.random() < 0.5:
        x = x.flip(1)
    loss = torch.nn.functional.cross_entropy(model(x), y)
    model.zero_grad()
    loss.backward()
    opt.step()
    for a, p in zip(average, model.parameters()):
        a.mul_(0.95).add_(p.detach(), alpha=0.05)
    history.append(loss.detach())
    if step % 5 == 4:
        recent = torch.stack(history[-5:])
        print(step + 1, f"{recent.mean():.10f}", recent.tolist()[0], f"{np.random.rand():.8f}", opt.flips, flush=True)

print("served", loader.dataset.served, "median", torch.stack(history).median().item())
weights = {f"average.{i}": a for i, a in enumerate(average)} | {k: v.contiguous() for k, v in model.state_dict().items()}
save_file(weights | {"history": torch.stack(history)}, "model.safetensors")
