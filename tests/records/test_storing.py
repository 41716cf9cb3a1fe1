"""Records in files: every field comes back bit for bit, or a named error says why not."""

import dataclasses
import errno
import json
import math
import os
import stat
import zipfile
from collections.abc import Mapping

import numpy
import pytest
import torch
from pair_helpers import F64, make_evidence, make_gaps
from test_every_record import COLUMNS, made

import pyro_vae as pv
from pyro_vae.errors import RecordFileError
from pyro_vae.records import Result, from_arrays, load_value, save_value, to_arrays, write_whole
from pyro_vae.records import files as files_module


def same(one, other):
    """Equal bit for bit, in type, dtype, shape and order: NaN is NaN, and -0.0 is not 0.0."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        assert other.device.type == "cpu" and not other.requires_grad
        one, other = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (one, other))
        assert torch.equal(one, other)
    elif isinstance(one, Result):
        assert type(one) is type(other)
        for field in dataclasses.fields(one):
            if field.name not in one._not_stored:
                same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, Mapping):
        assert isinstance(other, Mapping) and list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert isinstance(other, list if isinstance(one, list) else tuple) and len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert type(one) is type(other)
        assert repr(one) == repr(other)


@pytest.fixture(scope="module")
def records():
    return made()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "evidence.npz"
    evidence = make_evidence([-1.0, -2.0, -1.5], checks={"precision": torch.tensor([False, True, False])})
    evidence.save(path)
    return path, evidence


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_record_comes_back_bit_for_bit(records, kind, tmp_path):
    path = tmp_path / "record.npz"
    records[kind].save(path)
    back = kind.load(path)
    same(records[kind], back)
    assert str(back) == str(records[kind])
    same(records[kind], Result.load(path))
    assert os.listdir(tmp_path) == ["record.npz"]


def test_programs_stay_out_of_a_sweep(records, tmp_path):
    records[pv.BetaSweep].save(tmp_path / "sweep.npz")
    back = pv.BetaSweep.load(tmp_path / "sweep.npz")
    assert back.pairs == () and back.stores == ()


DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_shape_and_stride(dtype, tmp_path):
    dtype = getattr(torch, dtype)
    flat = torch.arange(-6, 6, dtype=F64).to(dtype)
    tensors = {
        "flat": flat,
        "0-d": flat[3],
        "empty": flat[:0].reshape(0, 4),
        "transposed": flat.reshape(3, 4).T,
        "expanded": flat[:1].expand(5),
        "every other": flat[::2],
        "needs a gradient": flat.clone().requires_grad_() if dtype.is_floating_point else flat,
        "conjugate": flat.conj(),
    }
    save_value(tmp_path / "values.npz", tensors)
    same({name: value.resolve_conj() for name, value in tensors.items()}, load_value(tmp_path / "values.npz"))


def test_every_kind_of_plain_value(tmp_path):
    one = torch.tensor(1.0)
    values = {
        "none": None,
        "truth": (True, False),
        "whole": [0, -1, 2**80],
        "reals": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "text": ["", "a/b\\c", "\0", "z[0].x", "ünï – ☃", "\ud800", "float", '{"float": "nan"}'],
        "tensor": {"tensor": one, "float": "nan", "record": {}},
        "nested": ((), [], {}, ([{"a": (one, [one])}],)),
        3: "keys may be numbers",
        (1, "b"): "or tuples",
        "a\0b": one,
        "a\0c": one + 1,
        "../x": one + 2,
        "/etc/x": one + 3,
        "x" * 300 + "1": one + 4,
        "x" * 300 + "2": one + 5,
    }
    save_value(tmp_path / "values.npz", values)
    same(values, load_value(tmp_path / "values.npz"))


def test_places_that_would_share_a_name(tmp_path):
    value = {"a": {"b": torch.tensor(1)}, "a][b": torch.tensor(2), "a?": torch.tensor(3), "a!": torch.tensor(4)}
    plain, arrays = to_arrays(value)
    assert len(arrays) == 4
    json.dumps(plain, allow_nan=False)
    same(value, from_arrays(plain, arrays))


def test_numpy_numbers_become_plain_ones(tmp_path):
    same(
        [1.5, 3, True, math.inf],
        from_arrays(*to_arrays([numpy.float64(1.5), numpy.int64(3), numpy.True_, numpy.float32("inf")])),
    )


def test_numpy_alone_can_read_it(saved):
    path, evidence = saved
    with numpy.load(path, allow_pickle=False) as file:
        assert file["log_evidence"].tolist() == evidence.log_evidence.tolist()
        assert file["checks[precision]"].tolist() == [False, True, False]


def test_the_same_record_makes_the_same_bytes(saved, tmp_path):
    path, evidence = saved
    evidence.save(tmp_path / "again.npz")
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_names_and_text_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_evidence([-1.0]).save("without ending")
    assert os.listdir() == ["without ending"]
    assert len(pv.Evidence.load("without ending")) == 1


def test_rights_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    make_evidence([-1.0]).save(tmp_path / "record")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "record")]
    assert modes[0] == modes[1]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "record")
    make_evidence([-1.0]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(pv.Evidence.load(tmp_path / "far" / "record")) == 1


# What is refused


def refused(path, *words, kind=pv.Evidence):
    with pytest.raises(RecordFileError) as info:
        kind.load(path)
    assert all(word in str(info.value) for word in (*words, str(path))), str(info.value)
    return info.value


def test_another_kind_of_record(saved):
    path, _ = saved
    refused(path, "holds a Evidence", "expected a Gaps", "Evidence.load", kind=pv.Gaps)


def test_a_file_that_is_not_there(tmp_path):
    error = refused(tmp_path / "nothing.npz", "No such file", "save()")
    assert isinstance(error, OSError)


@pytest.mark.parametrize("content", [b"", b"PK", b"hello" * 100, bytes(1000)], ids=["empty", "short", "text", "zeros"])
def test_a_file_of_something_else(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    refused(tmp_path / "other", "was not written by save()")


def test_a_plain_npz_and_a_folder(tmp_path):
    numpy.savez(tmp_path / "plain.npz", log_evidence=numpy.zeros(3))
    refused(tmp_path / "plain.npz", "was not written by save()")
    refused(tmp_path, "directory")


def rewritten(path, change):
    """The file with another header, and a digest that is right again."""
    header, arrays = files_module.read_arrays(path)
    change(header, arrays)
    files_module.write_arrays(path, header, arrays)


def put(*keys, value):
    def change(header, arrays):
        place = header
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (put("format", value=99), ("format 99", "newer pyro_vae", "update")),
        (put("format", value="one"), ("has no format number",)),
        (put("value", "record", value="Nothing"), ("has a Nothing", "not a known record class")),
        (put("value", "record", value="os.system"), ("has a os.system", "not a known record class")),
        (put("value", "record", value="Result"), ("has a Result", "not a known record class")),
        (put("value", "fields", "colour", value=1), ("colour besides these", "version")),
        (put("value", "fields", "bound", value={"eval": "1"}), ("a value that this version knows",)),
        (put("value", "fields", "bound", value={"tensor": "elsewhere"}), ("a value that this version knows",)),
        (put("value", "fields", "bound", value={"float": "1e5"}), ("a value that this version knows",)),
        (lambda header, arrays: header["value"]["fields"].pop("log_evidence"), ("lacks log_evidence",)),
        (lambda header, arrays: header.pop("value"), ("holds a NoneType",)),
        (put("value", value=[1]), ("a value that this version knows",)),
    ],
)
def test_a_whole_file_that_says_something_else(saved, change, words):
    path, _ = saved
    rewritten(path, change)
    refused(path, *words)


def test_a_field_with_a_default_may_be_missing(saved):
    """As in a file of an older version, which did not know the field."""
    path, _ = saved
    rewritten(path, lambda header, arrays: header["value"]["fields"].pop("tolerance"))
    assert pv.Evidence.load(path).tolerance is None


def test_every_flipped_bit_and_every_length_is_seen(saved):
    path, _ = saved
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(8, (len(whole),), generator=generator).tolist()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bits[place]
        path.write_bytes(damaged)
        with pytest.raises(RecordFileError, match="damaged"):
            Result.load(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(RecordFileError, match="cut short"):
            Result.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(RecordFileError):
        Result.load(path)
    path.write_bytes(whole)
    Result.load(path)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mine(Result):
    value: object


def test_a_record_of_ones_own(tmp_path):
    Mine(torch.ones(2)).save(tmp_path / "mine")
    same(Mine(torch.ones(2)), Mine.load(tmp_path / "mine"))


@pytest.mark.parametrize(
    "value, words",
    [
        (len, "value, which is a builtin_function_or_method"),
        ({"a": {1, 2}}, r"value\[a\], which is a set"),
        (torch.eye(2).to_sparse(), "to_dense"),
        (torch.ones(2, device="meta"), "device meta"),
    ],
    ids=["function", "set", "sparse", "meta"],
)
def test_what_no_file_holds_leaves_no_file(tmp_path, value, words):
    with pytest.raises(RecordFileError, match=words):
        Mine(value).save(tmp_path / "mine")
    assert not os.listdir(tmp_path)


def test_two_classes_of_one_name(tmp_path):
    evidence = dataclasses.make_dataclass("Evidence", [("x", int)], bases=(Result,), frozen=True, eq=False, repr=False)
    with pytest.raises(RecordFileError, match="another Evidence has the same"):
        evidence(1).save(tmp_path / "mine")
    make_evidence([-1.0]).save(tmp_path / "ours")
    assert type(Result.load(tmp_path / "ours")) is pv.Evidence


# Writing


def failing(call):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fail


@pytest.mark.parametrize("call", ["fsync", "replace", "write_array"])
def test_a_failing_write_leaves_the_old_file_whole(saved, monkeypatch, call):
    path, old = saved
    with monkeypatch.context() as patched:
        patched.setattr(numpy.lib.format if call == "write_array" else os, call, failing(call))
        with pytest.raises(RecordFileError, match="No space left on device.*The old file is unchanged") as info:
            make_gaps(1.0, 0.5).save(path)
    assert str(path) in str(info.value)
    assert os.listdir(path.parent) == [path.name]
    same(old, pv.Evidence.load(path))


def test_an_interrupt_in_the_middle_leaves_the_old_file_whole(saved):
    path, old = saved

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write)
    assert os.listdir(path.parent) == [path.name]
    same(old, pv.Evidence.load(path))


def test_folders_that_cannot_be_written(tmp_path):
    evidence = make_evidence([-1.0])
    with pytest.raises(RecordFileError, match="No such file or directory"):
        evidence.save(tmp_path / "nowhere" / "evidence")
    with pytest.raises(RecordFileError, match="directory"):
        evidence.save(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RecordFileError, match="Not a directory"):
        evidence.save(tmp_path / "file" / "evidence")
    with pytest.raises(RecordFileError, match="too long"):
        evidence.save(tmp_path / ("x" * 300))
    with pytest.raises(RecordFileError, match="null"):
        evidence.save("a\0b")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RecordFileError, match="Permission denied"):
            make_evidence([-1.0]).save(tmp_path / "evidence")
    finally:
        tmp_path.chmod(0o700)
    assert not os.listdir(tmp_path)


def test_the_temporary_name_is_new_each_time_and_in_the_same_folder(tmp_path):
    seen = []
    for _ in range(2):
        write_whole(tmp_path / "record", lambda file: seen.append(file.name))
    assert len(set(seen)) == 2 and all(os.path.dirname(name) == str(tmp_path) for name in seen)


def test_no_member_is_pickled(saved):
    with zipfile.ZipFile(saved[0]) as archive:
        for name in archive.namelist():
            assert b"O" not in archive.read(name)[:128].split(b"descr")[-1][:10]
