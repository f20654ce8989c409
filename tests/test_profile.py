"""The table of a trace: its operations, their source, their order, and the errors."""
import jax
import jax.numpy as jnp
import pytest

from train.profile import main, read_operations, top_operations, trace


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A trace of ten runs of a program in which one product outweighs everything."""
  def f(a, b):
    small = jnp.einsum("xy,yz->xz", a[:64, :64], b[:64, :64])
    return jnp.sin(jnp.einsum("ij,jk->ik", a, b)).sum() + small.sum()

  n = 1024
  a = jax.device_put(jnp.ones((n, n)), jax.devices()[0])
  program = jax.jit(f).lower(a, a).compile()
  directory = tmp_path_factory.mktemp("profile")
  with trace(directory, program):
    for _ in range(10):
      jax.block_until_ready(program(a, a))
  return directory


def test_the_largest_product_leads_and_is_named_by_its_einsum(directory):
  rows = read_operations(directory)
  assert (rows[0].kind, rows[0].source, rows[0].count) == ("matmul", "ij,jk->ik", 10)
  small = next(row for row in rows if row.source == "xy,yz->xz" and row.kind == "matmul")
  assert small.count == 10 and small.ms < rows[0].ms / 20  # 4096 times fewer FLOPs.
  assert [row.ms for row in rows] == sorted((row.ms for row in rows), reverse=True)


def test_the_table_adds_up(directory):
  rows, table = read_operations(directory), top_operations(directory, limit=2)
  assert table.splitlines()[0] == (
      f"{sum(r.ms for r in rows):.1f} ms in {sum(r.count for r in rows)} operations")
  assert table.count("ij,jk->ik") == 1 and table.splitlines()[-1].endswith(f"{len(rows) - 2} more")


def test_the_command_line(directory, tmp_path, capsys):
  assert main([str(directory), "--limit=2"]) == 0
  assert capsys.readouterr().out == top_operations(directory, limit=2)
  assert main([str(tmp_path)]) == 2
  assert "--profile" in capsys.readouterr().err
  assert main([str(tmp_path / "nowhere")]) == 2
  assert "is not a directory" in capsys.readouterr().err
