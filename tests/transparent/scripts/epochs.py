"""Epochs over a loader: dropout and batch norm, a schedule, clipping, a running loss, a validation, the best weights kept."""

import argparse
import copy

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--out", default="model.safetensors")
args = parser.parse_args()

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, 64)
        self.bn = nn.BatchNorm1d(64)
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(64, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = F.relu(self.bn(self.fc1(x)))
        return self.fc2(self.drop(x))


x = torch.randn(600, 20)
y = (x[:, :5] + 0.3 * torch.randn(600, 5)).argmax(1)
train_set, val_set = random_split(TensorDataset(x, y), [500, 100])
train_loader = DataLoader(train_set, batch_size=25, shuffle=True)
val_loader = DataLoader(val_set, batch_size=50)

model = Net()
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(train_loader))
best, best_state = 0.0, None

for epoch in range(args.epochs):
    model.train()
    running, seen = 0.0, torch.zeros(())
    for i, (inputs, labels) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = criterion(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        running += loss.item()
        seen += loss.detach()
        if (i + 1) % 10 == 0:
            print(f"epoch {epoch} step {i + 1}: loss {running / 10:.12f} lr {scheduler.get_last_lr()[0]:.9f}", flush=True)
            running = 0.0
    model.eval()
    correct = 0
    with torch.no_grad():
        for inputs, labels in val_loader:
            correct += (model(inputs).argmax(1) == labels).sum().item()
    print(f"epoch {epoch}: accuracy {correct / len(val_set)} sum {seen}", flush=True)
    if correct / len(val_set) > best:
        best, best_state = correct / len(val_set), copy.deepcopy(model.state_dict())

print("best", best, "calls", model.calls)
final = {f"best.{k}": v for k, v in best_state.items()} | {f"last.{k}": v for k, v in model.state_dict().items()}
save_file(final, args.out)
