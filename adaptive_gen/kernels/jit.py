"""How kernels are compiled.

Much of what numba compiles is not the kernels' own code: each comes once more for every constant
that it is given, with wrappers for callers in Python and in C, and counts references to arrays. So
it is said of each kernel who calls it, and what it does with arrays.
"""

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core.cpu import CPUTargetOptions

from .freshness import stamped

# What may be reordered: sums. Nobody may assume that there is no nan and no infinity.
_SUMS = {"contract", "reassoc", "nsz", "arcp"}


def inner(function: Any) -> Any:
    """Compile a function that kernels call, and that works on arrays which it is given.

    Their references are not counted, which takes an atomic operation for every array of a tuple,
    whenever that is handed on or taken apart. Python cannot call it.
    """
    return _inside(_made(function, no_cpython_wrapper=True, **_counting(False), **_fast()))


def entry(function: Any) -> Any:
    """Compile a function as `inner` does, for Python to call as well."""
    return _made(function, **_counting(False), **_fast())


def compiled(function: Any) -> Any:
    """Compile a function that makes arrays, or shares them with other threads."""
    return _made(function, **_counting(True), **_fast())


def exact(function: Any) -> Any:
    """Compile a function as `entry` does, but for no other result than Python's."""
    return _made(function, fastmath=False, error_model="numpy", **_counting(False))


def _made(function: Any, **options: Any) -> Any:
    """Compile with options, none of which may be left out: a kernel inherits its caller's."""
    options |= {"nogil": True, "cache": True, "no_cfunc_wrapper": True}
    return stamped(_for_any_number(njit(function, **options)))


def _fast() -> dict[str, Any]:
    return {"fastmath": _SUMS, "error_model": "numpy"}


def _counting(references: bool) -> dict[str, Any]:
    # Where numba has no such option all are counted, and that takes longer.
    return {"_nrt": references} if hasattr(CPUTargetOptions, "_nrt") else {}


def _for_any_number(function: Any) -> Any:
    """Have numba compile once for all numbers of a type, where it would for each constant."""
    by_constants: Callable[..., Any] | None = getattr(function, "get_call_template", None)
    if by_constants is None:  # numba no longer works this way: more to compile, and never wrong
        return function

    def by_types(args: Any, kws: Any) -> Any:
        named = {name: types.unliteral(kind) for name, kind in kws.items()}
        return by_constants(tuple(map(types.unliteral, args)), named)

    function.get_call_template = by_types
    return function


def _inside(function: Any) -> Any:
    """Refuse calls from Python, which would jump to where nothing is."""

    def refuse(*args: Any, **kws: Any) -> Any:
        raise TypeError(f"{function.__name__} is called by kernels only; `entry` is for Python")

    def known(result: Any) -> None:
        function.overloads[tuple(result.signature.args)] = result

    function._compile_for_args, function.add_overload = refuse, known
    return function
