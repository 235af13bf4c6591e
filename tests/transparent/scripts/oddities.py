"""What people also do: LBFGS with a closure, a gradient penalty, an averaged model, files, hand-made batches, hooks, an iterable dataset."""

import csv
import random

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(40):
            yield {"text": f"row {i} {random.randint(0, 9)}", "x": torch.randn(3) + i % 3}


torch.manual_seed(8)
random.seed(9)
names = list({"alpha", "beta", "gamma", "delta"})
x, y = torch.randn(96, 3), torch.rand(96)
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
seen = []
model[1].register_forward_hook(lambda m, i, o: seen.append(float(o.detach().abs().mean())))
average = AveragedModel(model)
opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
sampler = WeightedRandomSampler(torch.rand(96).tolist(), 30)
log = open("log.csv", "w", newline="")
rows = csv.writer(log)

for epoch in range(3):
    order = torch.randperm(96)
    for start in range(0, 96, 24):
        idx = order[start : start + 24]
        xb = x[idx].clone().requires_grad_()
        out = model(xb).squeeze(1)
        (slope,) = torch.autograd.grad(out.sum(), xb, create_graph=True)
        hard = out[y[idx] > 0.3]
        loss = nn.functional.mse_loss(out, y[idx]) + 0.01 * slope.pow(2).sum() + 0.001 * hard.abs().sum()
        opt.zero_grad(set_to_none=False)
        loss.backward()
        opt.step()
        average.update_parameters(model)
        rows.writerow([epoch, start, loss.item(), hard.numel(), random.choice(names)])
        log.flush()
    for i in DataLoader(range(96), sampler=sampler, batch_size=10):
        rows.writerow([int(i.sum())])
    for row in DataLoader(Stream(), batch_size=8):
        opt.zero_grad()
        model(row["x"]).mean().backward()
        opt.step()
        print(epoch, row["text"][0], f"{row['x'].sum():.6f}", flush=True)
    torch.save({"model": model.state_dict(), "epoch": epoch}, f"epoch{epoch}.pt")
    model.load_state_dict(torch.load(f"epoch{epoch}.pt")["model"])

lbfgs = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)


def closure():
    lbfgs.zero_grad()
    loss = nn.functional.mse_loss(model(x).squeeze(1), y)
    loss.backward()
    return loss


for _ in range(6):
    print("lbfgs", lbfgs.step(closure).item(), flush=True)

log.close()
print(open("log.csv").read(), sum(seen), len(seen))
print(sorted({k: v.shape for k, v in average.state_dict().items()}))
kept = {f"average.{k}": v for k, v in average.state_dict().items()} | {f"model.{k}": v for k, v in model.state_dict().items()}
kept |= torch.load("epoch1.pt")["model"]
save_file(kept, "model.safetensors")
