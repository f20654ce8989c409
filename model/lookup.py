"""Names in configs -> Python objects."""
import difflib
import importlib


def lookup(table: dict, name: str, field: str = "name"):
  """`name` is a key of `table`, or "package.module:Object" for code that lives under experiments/.

  Raises:
    ValueError: naming `field`, the value, the valid names and the nearest of them.
  """
  if name in table:
    return table[name]
  if ":" in name:
    module, attr = name.split(":", 1)
    try:
      return getattr(importlib.import_module(module), attr)
    except (ModuleNotFoundError, AttributeError) as e:
      raise ValueError(f"{field}={name!r} cannot be imported: {e}") from e
  near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
  hint = f"; did you mean {near[0]!r}?" if near else ""
  raise ValueError(f"{field}={name!r} is not one of {sorted(table)} nor a module:Object path{hint}")
