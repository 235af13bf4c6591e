"""Gradient accumulation with automatic mixed precision and a scaler, workers that augment, a language model whose state goes on."""

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

ACCUMULATE = 3


class Text(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, i):
        tokens = (torch.arange(13) * (i % 5 + 1) + i) % 30
        noise = torch.rand(13) < 0.05
        return torch.where(noise, torch.randint(30, (13,)), tokens)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.rnn = nn.LSTM(24, 24, batch_first=True)
        self.head = nn.Linear(24, 30, bias=False)

    def forward(self, x, state=None):
        h, state = self.rnn(self.embed(x), state)
        return self.head(h), state


def main():
    torch.manual_seed(5)
    loader = DataLoader(Text(), batch_size=6, shuffle=True, num_workers=2)
    model = Model()
    optimizer = torch.optim.Adam(
        [{"params": model.embed.parameters(), "lr": 1e-2}, {"params": [*model.rnn.parameters(), *model.head.parameters()]}]
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=4)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    state = None
    for epoch in range(3):
        total, count = 0.0, 0
        optimizer.zero_grad()
        for i, batch in enumerate(loader, start=1):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits, state = model(batch[:, :-1], state)
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            state = tuple(s.detach() for s in state)
            scaler.scale(loss / ACCUMULATE).backward()
            total, count = total + float(loss), count + 1
            if i % ACCUMULATE == 0:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                print(f"epoch {epoch} batch {i} loss {total / count:.9f} norm {norm:.7f} scale {scaler.get_scale()}", flush=True)
        plateau.step(total / count)
        print("learning rates", [group["lr"] for group in optimizer.param_groups], flush=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()} | {"h": state[0].contiguous()}, "model.safetensors")


if __name__ == "__main__":
    main()
