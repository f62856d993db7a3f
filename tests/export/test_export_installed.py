"""The quantiser of a llama.cpp that the user points at: a program of its own, here one that stands for llama-quantize."""

import struct
import sys

import numpy as np
import pytest

from exactune.errors import ArtefactError, DeviceError
from export_models import tiny, tokenizer

pytest.importorskip("llama_cpp", reason="files are judged by llama.cpp itself: pip install 'exactune[gguf]'")

from exactune.export.gguf.export import export_gguf
from exactune.export.gguf.installed import imatrix_file, quantiser_of

# Takes llama-quantize's command line, reads its imatrix format, and quantises with the llama.cpp that is installed here.
PROGRAM = """#!{python}
import pathlib, struct, sys
import numpy as np
from exactune.export.gguf import levels

arguments, importance = sys.argv[1:], None
if arguments[0] == "--imatrix":
    data, importance = pathlib.Path(arguments[1]).read_bytes(), {{}}
    (count,), at = struct.unpack_from("<i", data), 4
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        calls, columns = struct.unpack_from("<ii", data, at + 4 + length)
        at += 12 + length
        importance[name] = np.frombuffer(data, "<f4", columns, at) / calls
        at += 4 * columns
    assert at == len(data)
    arguments = arguments[2:]
source, target, level = arguments
levels.quantise(pathlib.Path(source), pathlib.Path(target), level.lower(), importance)
(pathlib.Path(__file__).parent / "used").write_text(repr([level, importance is not None]))
"""


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder laid out as a built llama.cpp is."""
    program = tmp_path / "llama.cpp" / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return tmp_path / "llama.cpp"


@pytest.mark.parametrize("imatrix", [None, ["def f(x): return x", "a sorted list of names"]], ids=["plain", "weighed"])
def test_gives_the_file_that_our_own_quantiser_gives(tmp_path, llama_cpp, imatrix):
    model = tiny("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    for name, folder in (("own", None), ("theirs", llama_cpp)):
        export_gguf(
            model, tokenizer(), tmp_path / name, quantization_method="q4_k_s", llama_cpp=folder, imatrix=imatrix
        )  # fmt: skip
    own, theirs = ((tmp_path / name / "model-q4_k_s.gguf").read_bytes() for name in ("own", "theirs"))
    assert own == theirs
    assert (llama_cpp / "build" / "bin" / "used").read_text() == repr(["Q4_K_S", imatrix is not None])


def test_a_program_that_fails(tmp_path, llama_cpp):
    program = llama_cpp / "build" / "bin" / "llama-quantize"
    program.write_text("#!/bin/sh\necho this level wants an imatrix >&2\nexit 1\n")
    with pytest.raises(ArtefactError, match=r"exit code 1\): this level wants an imatrix\n.*pass imatrix"):
        export_gguf(tiny("llama", hidden_size=256), tokenizer(), tmp_path / "out", quantization_method="q4_k_m", llama_cpp=llama_cpp)
    assert not list((tmp_path / "out").iterdir())
    program.write_text("no program at all")
    with pytest.raises(DeviceError, match="does not run"):
        export_gguf(tiny("llama", hidden_size=256), tokenizer(), tmp_path / "out", quantization_method="q4_k_m", llama_cpp=program)


def test_no_llama_quantize_is_one_sentence(tmp_path):
    with pytest.raises(DeviceError, match="There is no llama-quantize in"):
        quantiser_of(tmp_path)


def test_imatrix_file_is_laid_out_as_llama_cpp_reads_it():
    data = imatrix_file({"blk.0.attn_q.weight": np.array([1.0, 2.5], np.float64)})
    assert struct.unpack_from("<ii", data) == (1, 19) and data[8:27] == b"blk.0.attn_q.weight"
    assert struct.unpack_from("<iiff", data, 27) == (1, 2, 1.0, 2.5) and len(data) == 27 + 16
