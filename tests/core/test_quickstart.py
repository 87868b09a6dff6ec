"""The project's agreed quickstart, pasted as it is after a small model of the reader's own."""

QUICKSTART = """
import torch, relora_core as relora

relora.add_low_rank_(model, ["*.self_attn.*", "*.mlp.*"], rank=128, alpha=32)
optimizer = relora.ResettableOptimizer(
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))
restarts = relora.Restarts(every=1000, warmup=100)          # one clock, in optimizer steps
schedule = relora.JaggedLR(
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20_000), restarts)

for step, batch in enumerate(batches):
    if restarts.at(step):
        relora.restart_(model, optimizer, prune_ratio=0.99)  # merge, re-draw, prune
    model(batch).backward()
    optimizer.step(); schedule.step(); optimizer.zero_grad()

relora.save_merged(model, "out/")                            # plain names, safetensors
"""

READERS_OWN = """
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(128, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))

    def forward(self, x):
        return x + self.mlp(x + self.self_attn(x, x, x)[0])

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.head = nn.Linear(128, 1)

    def forward(self, batch):
        for layer in self.layers:
            batch = layer(batch)
        return (self.head(batch) - 1).square().mean()

model = Model()
batches = (torch.randn(2, 3, 128) for _ in range(1010))
"""


def test_it_runs_as_written(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(compile(READERS_OWN + QUICKSTART, "<quickstart>", "exec"), space)
    import relora_core as relora

    sites = dict(relora.low_rank_sites(space["model"]))
    assert set(sites) == {"layers.0.self_attn.out_proj", "layers.0.mlp.0", "layers.0.mlp.2"}
    assert all(site.restart == 1 for site in sites.values())
    plain = space["Model"]()
    plain.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
