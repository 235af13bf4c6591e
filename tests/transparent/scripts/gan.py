"""Two optimizers, in the manner of the DCGAN tutorial: `fake` is made before one step and learned from before the other."""

import torch
import torch.nn as nn
import torch.optim as optim
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(999)
nz = 8


def weights_init(m):
    if m.__class__.__name__.find("Linear") != -1:
        nn.init.normal_(m.weight.data, 0.0, 0.2)
    elif m.__class__.__name__.find("BatchNorm") != -1:
        nn.init.normal_(m.weight.data, 1.0, 0.02)
        nn.init.constant_(m.bias.data, 0)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(nz, 32), nn.BatchNorm1d(32), nn.ReLU(True), nn.Linear(32, 2))

    def forward(self, z):
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2, inplace=True), nn.Dropout(0.2), nn.Linear(32, 1), nn.Sigmoid())

    def forward(self, x):
        return self.main(x)


angles = torch.rand(320) * 6.2832
dataloader = DataLoader(TensorDataset(torch.stack([angles.cos(), angles.sin()], 1)), batch_size=32, shuffle=True)
netG, netD = Generator(), Discriminator()
netG.apply(weights_init)
netD.apply(weights_init)
criterion = nn.BCELoss()
fixed_noise = torch.randn(5, nz)
optimizerD = optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))
G_losses, D_losses = [], []

for epoch in range(4):
    for i, (data,) in enumerate(dataloader, 0):
        netD.zero_grad()
        b_size = data.size(0)
        label = torch.full((b_size,), 1.0, dtype=torch.float)
        output = netD(data).view(-1)
        errD_real = criterion(output, label)
        errD_real.backward()
        D_x = output.mean().item()
        fake = netG(torch.randn(b_size, nz))
        label.fill_(0.0)
        output = netD(fake.detach()).view(-1)
        errD_fake = criterion(output, label)
        errD_fake.backward()
        errD = errD_real + errD_fake
        optimizerD.step()

        netG.zero_grad()
        label.fill_(1.0)
        output = netD(fake).view(-1)
        errG = criterion(output, label)
        errG.backward()
        optimizerG.step()
        if i % 5 == 0:
            print("[%d][%d] Loss_D: %.8f Loss_G: %.8f D(x): %.8f" % (epoch, i, errD.item(), errG.item(), D_x), flush=True)
        G_losses.append(errG.item())
        D_losses.append(errD.item())
    with torch.no_grad():
        print("sample", netG(fixed_noise).numpy().tolist()[0], flush=True)

print(sum(G_losses), sum(D_losses))
save_file({f"G.{k}": v for k, v in netG.state_dict().items()} | {f"D.{k}": v for k, v in netD.state_dict().items()}, "model.safetensors")
