"""The yardstick: the same model and optimizer in PyTorch eager, written to be fast. Needs torch; nothing else
here does.

python -m experiments.bench.torch_eager CASE.npz
answers each line on stdin with one training step, as JSON on stdout: seconds, loss, grad_norm.
"""
import json
import sys
import time

import numpy as np

try:
  import torch
except ModuleNotFoundError as e:
  raise ModuleNotFoundError("the yardstick needs PyTorch: pip install torch==2.13.0 (the CPU build)") from e
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
  def __init__(self, D, N, H, FF, eps):
    super().__init__()
    self.N, self.H = N, H
    self.attention_norm, self.ffn_norm = nn.RMSNorm(D, eps=eps), nn.RMSNorm(D, eps=eps)
    self.wq, self.wk, self.wv = (nn.Linear(D, N * H, bias=False) for _ in range(3))
    self.wo = nn.Linear(N * H, D, bias=False)
    self.w_gate, self.w_up = nn.Linear(D, FF, bias=False), nn.Linear(D, FF, bias=False)
    self.w_down = nn.Linear(FF, D, bias=False)

  def forward(self, x_BTD, cos_TH, sin_TH):
    B, T, _ = x_BTD.shape
    h_BTD = self.attention_norm(x_BTD)
    q, k, v = (w(h_BTD).view(B, T, self.N, self.H).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
    out = F.scaled_dot_product_attention(
        rotate(q, cos_TH, sin_TH), rotate(k, cos_TH, sin_TH), v, is_causal=True)
    x_BTD = x_BTD + self.wo(out.transpose(1, 2).reshape(B, T, -1))
    h_BTD = self.ffn_norm(x_BTD)
    return x_BTD + self.w_down(F.silu(self.w_gate(h_BTD)) * self.w_up(h_BTD))


def rotate(x, cos_TH, sin_TH):
  x1, x2 = x.chunk(2, dim=-1)
  return torch.cat([x1 * cos_TH - x2 * sin_TH, x2 * cos_TH + x1 * sin_TH], dim=-1)


class Model(nn.Module):
  """Built from the arrays of ours, so that both start at the same weights."""

  def __init__(self, params, seq_len, theta, eps):
    super().__init__()
    L, D, N, H = params["blocks/0/attention/wq"].shape
    V, FF = params["embed"].shape[0], params["blocks/0/ffn/w_gate"].shape[2]
    self.embed = nn.Embedding(V, D)
    self.blocks = nn.ModuleList(Block(D, N, H, FF, eps) for _ in range(L))
    self.final_norm, self.unembed = nn.RMSNorm(D, eps=eps), nn.Linear(D, V, bias=False)
    angle = torch.outer(torch.arange(seq_len), theta ** (-torch.arange(H // 2) / (H // 2)))
    self.cos_TH, self.sin_TH = angle.cos(), angle.sin()
    with torch.no_grad():
      self._load({name: torch.from_numpy(a) for name, a in params.items()})

  def _load(self, params):
    D = self.embed.weight.shape[1]
    self.embed.weight.copy_(params["embed"])
    self.unembed.weight.copy_(params["unembed"].T)
    self.final_norm.weight.copy_(params["final_norm/scale"])
    for i, block in enumerate(self.blocks):
      of = lambda name, i=i: params[f"blocks/0/{name}"][i]
      for name in ("wq", "wk", "wv"):
        getattr(block, name).weight.copy_(of(f"attention/{name}").reshape(D, -1).T)
      block.wo.weight.copy_(of("attention/wo").reshape(-1, D).T)
      for name in ("w_gate", "w_up", "w_down"):
        getattr(block, name).weight.copy_(of(f"ffn/{name}").T)
      for name in ("attention_norm", "ffn_norm"):
        getattr(block, name).weight.copy_(of(f"{name}/scale"))

  def forward(self, tokens_BT, targets_BT):
    x_BTD = self.embed(tokens_BT)
    for block in self.blocks:
      x_BTD = block(x_BTD, self.cos_TH, self.sin_TH)
    return F.cross_entropy(self.unembed(self.final_norm(x_BTD)).flatten(0, 1), targets_BT.flatten())


def make_step(arrays):
  """() -> {"loss", "grad_norm"}: one step of AdamW as the settings in `arrays` say."""
  params = {name.removeprefix("params/"): a for name, a in arrays.items() if name.startswith("params/")}
  number = lambda name: float(arrays[name])
  model = Model(params, arrays["tokens"].shape[1], number("rope_theta"), number("norm_eps"))
  kinds = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
  groups = [dict(params=kinds[0], weight_decay=number("weight_decay")),
            dict(params=kinds[1], weight_decay=0.0)]
  adamw = torch.optim.AdamW(
      groups, lr=number("lr"), betas=(number("b1"), number("b2")), eps=number("eps"), fused=True)
  tokens_BT, targets_BT = (torch.from_numpy(arrays[name]).long() for name in ("tokens", "targets"))

  def step():
    adamw.zero_grad(set_to_none=True)
    loss = model(tokens_BT, targets_BT)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), number("grad_clip"))
    adamw.step()
    return {"loss": loss.item(), "grad_norm": grad_norm.item()}

  return step


def main():
  torch.set_num_threads(int(sys.argv[2]))
  step = make_step(dict(np.load(sys.argv[1])))
  print(json.dumps({"version": torch.__version__}), flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    numbers = step()
    print(json.dumps({"seconds": time.perf_counter() - start, **numbers}), flush=True)


if __name__ == "__main__":
  main()
