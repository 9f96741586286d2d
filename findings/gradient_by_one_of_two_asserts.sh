#!/usr/bin/env bash
# jax 0.10.2 on CPU: a gradient by one of two inputs is a bare AssertionError if the derivative is a linear_call.
#
# A product has a custom_jvp whose tangent is `linear_call` of both tangents, with a transpose that is right. Its gradient by both
# inputs works, and so does its forward derivative by the first alone. The gradient by the first alone raises an AssertionError without
# a message: the second tangent is then an array of zeros and not a variable, and the transpose expects variables only. A training that
# moves all inputs never meets it; whoever later takes the gradient of the model by its image alone does. With `symbolic_zeros=True`
# the rule sees which tangents there are, and can pass those alone.
# Output seen:
#   jax 0.10.2
#   gradient by both: 3.0 2.0
#   forward by the first: 3.0
#   gradient by the first: AssertionError ''
#   with symbolic zeros: 3.0
set -euo pipefail
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/product.py" <<'END'
import jax
from jax.custom_derivatives import SymbolicZero, linear_call

jax.config.update("jax_platforms", "cpu")


def make(symbolic):
    @jax.custom_jvp
    def product(x, y):
        return x * y

    def derivative(inputs, tangents):
        others = {"x": inputs[1], "y": inputs[0]}
        moving = {name: d for name, d in zip("xy", tangents) if not isinstance(d, SymbolicZero)}
        forward = lambda kept, d: sum(kept[name] * d[name] for name in d)
        backward = lambda kept, g: {name: kept[name] * g for name in moving}
        return product(*inputs), linear_call(forward, backward, others, moving)

    product.defjvp(derivative, symbolic_zeros=symbolic)
    return product


plain = make(False)
print("jax", jax.__version__)
print("gradient by both:", *jax.grad(plain, (0, 1))(2.0, 3.0))
print("forward by the first:", jax.jvp(lambda x: plain(x, 3.0), (2.0,), (1.0,))[1])
try:
    print("gradient by the first:", jax.grad(plain)(2.0, 3.0))
except BaseException as error:
    print("gradient by the first:", type(error).__name__, repr(str(error)))
print("with symbolic zeros:", jax.grad(make(True))(2.0, 3.0))
END
cd "$folder"
venv/bin/python product.py 2>/dev/null | tee seen
diff seen <(sed -n 's/^#   //p' "$script") || { echo "this has changed" >&2; exit 1; }
