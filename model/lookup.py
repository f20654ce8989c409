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
  check_choice(field, name, table, " nor a module:Object path")


def check_choice(field: str, value: str, valid, more: str = "") -> None:
  """Raises ValueError, with the nearest of them, where `value` is none of the `valid` strings."""
  if value not in valid:
    near = difflib.get_close_matches(value, valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{field}={value!r} is not one of {sorted(valid)}{more}{hint}")
