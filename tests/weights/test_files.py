"""Files of weights: every kind is read to the bit, and nothing in them is ever run."""

import io
import json
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fcclip.errors import InputError
from fcclip.modeling.backbones.clip import build_clip
from fcclip.weights.files import UnsafeFileError, read_plain_data, read_weight_file

TINY_RESNET = str(Path(__file__).parents[1] / "data" / "tiny_resnet.json")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert bits(found[key]) == bits(value), key


def weights() -> dict[str, torch.Tensor]:
    """Every dtype, odd shapes, and numbers that a conversion would change."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0x7FC01234, 0x7F800001, -0x80000000], dtype=torch.int64).to(torch.int32).view(torch.float32)
    found = {str(dtype): (torch.randn(3, 4, generator=generator) * 9).to(dtype) for dtype in DTYPES}
    return found | {"scalar": torch.tensor(4.6052), "empty": torch.zeros(0, 3), "NaN payloads, -0": odd}


def rewrite(path: Path, change) -> Path:
    """A zip archive with its records changed: change(name, content) -> content, or None to leave it out."""
    with zipfile.ZipFile(path) as file:
        records = [(info.filename, file.read(info)) for info in file.infolist()]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records:
            if (new := change(name, content)) is not None:
                file.writestr(name, new)
    return path


# ---- plain files ----


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_plain_value_of_a_checkpoint_comes_back(tmp_path, protocol):
    content = {"set": {1, 2}, "counts": Counter("aab"), "complex": 1j, "size": torch.Size([1, 2]), "bytes": b"x"}
    torch.save({"model": {"a": torch.ones(1)}, **content}, tmp_path / "a.pth", pickle_protocol=protocol)
    assert read_weight_file(tmp_path / "a.pth").rest == content


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read_to_the_bit(tmp_path, wrap, zipped):
    content = weights() if wrap == "bare" else {wrap: weights(), "iteration": 7, "notes": {"a": [1.5, None]}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = read_weight_file(tmp_path / "a.pth")
    assert_same(found.tensors, weights())
    assert found.kind == "torch"
    assert found.rest == ({} if wrap == "bare" else {"iteration": 7, "notes": {"a": [1.5, None]}})


def test_safetensors_bring_their_metadata_parsed(tmp_path):
    save_file(weights(), tmp_path / "a.safetensors", {"format": "pt", "clip": json.dumps({"text": [0.5]})})
    found = read_weight_file(tmp_path / "a.safetensors")
    assert_same(dict(sorted(found.tensors.items())), dict(sorted(weights().items())))
    assert found.kind == "safetensors" and found.rest == {"format": "pt", "clip": {"text": [0.5]}}


def test_the_format_is_told_by_the_content_not_the_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert read_weight_file(tmp_path / "weights.bin").kind == "safetensors"
    assert read_weight_file(tmp_path / "weights.safetensors").kind == "torch"


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_are_read_in_every_protocol(tmp_path, protocol):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns first": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        "big-endian": np.arange(3, dtype=">f4"),
        "0-d": np.array(2.5),
        "number": np.float32(0.1),
        "long": np.array([1 << 40]),
        "truth": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
    }
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True, "lr": np.float64(0.5)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_weight_file(tmp_path / "a.pkl")
    assert found.kind == "pickle"
    assert_same(found.tensors, {key: torch.tensor(np.array(value).astype(value.dtype.newbyteorder("=")))
                                for key, value in arrays.items()})  # fmt: skip
    assert found.rest == {"__author__": "somebody", "matching_heuristics": True, "lr": 0.5}
    assert type(found.rest["lr"]) is float


def test_pickles_written_by_python_2_are_read(tmp_path):
    """Values as byte strings, NumPy under its old names."""
    values = np.arange(4, dtype=np.float32).tobytes()
    short = b"U" + bytes([len(values)]) + values
    content = (
        b"\x80\x02}q\x01U\x01wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02K\x02\x86cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK"
        b"\x00tb\x89" + short + b"tbs."
    )
    (tmp_path / "a.pkl").write_bytes(content)
    assert read_weight_file(tmp_path / "a.pkl").tensors["w"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_tensors_are_read(tmp_path, protocol):
    content = weights() | {"parameter": nn.Parameter(torch.randn(3))}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_weight_file(tmp_path / "a.pkl")
    assert_same(found.tensors, {key: value.detach() for key, value in content.items()})
    assert type(found.tensors["parameter"]) is torch.Tensor


def test_numpy_values_in_a_torch_file_are_read(tmp_path):
    base = torch.arange(12.0)
    content = {
        "model": {"a": base[2:8].view(2, 3).t(), "b": base, "c": np.float32(1)},
        "best": np.float64(0.25),
        "history": [np.int64(3)],
    }
    torch.save(content, tmp_path / "a.pth")
    found = read_weight_file(tmp_path / "a.pth")
    assert_same(found.tensors, {"a": base[2:8].view(2, 3).t(), "b": base, "c": torch.tensor(1.0)})
    assert found.tensors["a"].untyped_storage().data_ptr() == found.tensors["b"].untyped_storage().data_ptr()
    assert found.rest == {"best": 0.25, "history": [3]} and found.kind == "torch"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module."])
def test_a_prefix_of_a_wrapper_goes_when_every_name_has_it(tmp_path, prefix):
    state = nn.Sequential(nn.Linear(1, 1)).state_dict(prefix=prefix)
    state._metadata = OrderedDict({prefix[:-1]: {"version": 1}, f"{prefix}0": {"version": 3}})
    torch.save({"model": state}, tmp_path / "a.pth")
    found = read_weight_file(tmp_path / "a.pth")
    assert list(found.tensors) == ["0.weight", "0.bias"]
    assert found.versions == {"": {"version": 1}, "0": {"version": 3}}
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pth")
    assert list(read_weight_file(tmp_path / "a.pth").tensors) == ["module.a", "b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"epoch": 3, "state": {}}, "neither a state dict nor one under .*; its keys are epoch, state"),
        ({"model": {"a": [1, 2]}}, "its keys are model, those under 'model' a"),
        ({"epoch": 3}, "neither a state dict"),
        ([torch.ones(1)], "holds a list, expected a mapping"),
        ({0: torch.ones(1)}, "neither a state dict"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path, content, says):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=says):
        read_weight_file(tmp_path / "a.pth")


def test_versions_of_modules_come_from_either_format(tmp_path):
    state = nn.Linear(1, 1).state_dict()
    state._metadata = OrderedDict({"": {"version": 2}})
    torch.save(state, tmp_path / "a.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"_metadata": '{"": {"version": 2}}', "note": "x"})
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors", {"_metadata": "something else"})
    assert read_weight_file(tmp_path / "a.pth").versions == {"": {"version": 2}}
    found = read_weight_file(tmp_path / "a.safetensors")
    assert found.versions == {"": {"version": 2}} and found.rest == {"note": "x"}
    assert read_weight_file(tmp_path / "b.safetensors").versions == {}


def test_plain_data_is_read_whole(tmp_path):
    torch.save({"random": [torch.ones(2), (1, 2)], "seed": 3}, tmp_path / "a.pth")
    found = read_plain_data(tmp_path / "a.pth")
    assert found["seed"] == 3 and found["random"][1] == (1, 2)
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="checkpoint .* is a safetensors file, which holds weights only"):
        read_plain_data(tmp_path / "a.safetensors")


# ---- TorchScript ----


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.halves = nn.Linear(4, 2).half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Tree(nn.Module):
    """Names as modules have them, and everything that must not pass for weights."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(6, 4)
        self.layers = nn.Sequential(Leaf(), nn.Identity())
        self.again = self.layers[0]  # shared
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.turned = nn.Parameter(base.t(), requires_grad=False)  # strided, shares its storage with `rows`
        self.register_buffer("rows", base[1:3])
        self.register_buffer("input_resolution", torch.tensor(224))
        self.register_buffer("kept_out", torch.ones(2), persistent=False)
        self.register_parameter("nothing", None)
        self.plain = torch.ones(3)
        self.several = [torch.ones(2), torch.ones(1)]
        self.number = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = self.plain.sum() + self.several[0].sum() + self.kept_out.sum() + self.number
        return self.layers(x) * self.scale + self.again(x) + self.turned.sum() + self.rows.sum() + total


@pytest.fixture(params=["script", "trace"])
def archive(request, tmp_path):
    torch.manual_seed(0)
    tree, path = Tree().eval(), tmp_path / "clip.pt"
    made = torch.jit.script(tree) if request.param == "script" else torch.jit.trace(tree, torch.randn(1, 3, 2, 2))
    made.save(str(path))
    return path


def test_a_torchscript_archive_gives_what_torch_would_give(archive):
    found, expected = read_weight_file(archive), torch.jit.load(archive).state_dict()
    assert_same(found.tensors, expected)
    assert found.kind == "torchscript" and found.rest == {}
    assert not {"plain", "several", "number", "nothing"} & set(found.tensors)
    assert {"input_resolution", "layers.0.norm.running_var", "again.halves.weight"} <= set(found.tensors)
    assert all(found.tensors[key].stride() == value.stride() for key, value in expected.items())
    assert not any(value.requires_grad for value in found.tensors.values())
    assert found.tensors["turned"].untyped_storage().data_ptr() == found.tensors["rows"].untyped_storage().data_ptr()


def test_an_archive_like_openais_is_the_clip_it_was_made_of(tmp_path):
    torch.manual_seed(0)
    clip = build_clip(TINY_RESNET).clip_model.half().float()
    with torch.no_grad():
        inputs = (torch.randn(1, 3, 64, 64), torch.randint(0, 100, (1, 77)))
        torch.jit.trace(clip, inputs, check_trace=False).save(str(tmp_path / "RN.pt"))
    found = read_weight_file(tmp_path / "RN.pt")
    expected = torch.jit.load(tmp_path / "RN.pt").state_dict()
    assert_same(found.tensors, expected)
    assert_same({key: found.tensors[key] for key in clip.state_dict()}, clip.state_dict())


def test_an_archive_from_a_machine_of_the_other_byte_order_is_read(archive):
    expected = torch.jit.load(archive).state_dict()
    other = "big" if sys.byteorder == "little" else "little"
    size = {f"{archive.stem}/data/{key}": size for key, size in storage_sizes(archive).items()}

    def swap(name: str, content: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return other.encode()
        return np.frombuffer(content, f"u{size[name]}").byteswap().tobytes() if name in size else content

    assert_same(read_weight_file(rewrite(archive, swap)).tensors, expected)


def storage_sizes(path: Path) -> dict[str, int]:
    """Bytes of one value in each storage of an archive."""
    with zipfile.ZipFile(path) as file:
        operations = list(pickletools.genops(file.read(f"{path.stem}/data.pkl")))
    widths = {"FloatStorage": 4, "HalfStorage": 2, "LongStorage": 8}
    found, width, texts, memo = {}, 4, [], []
    for opcode, argument, _ in operations:
        if opcode.name == "BINPUT" or opcode.name == "LONG_BINPUT":
            memo.append((texts or [None])[-1])
        texts.append(memo[argument] if opcode.name in ("BINGET", "LONG_BINGET") else argument)
        if isinstance(texts[-1], str) and texts[-1].startswith("torch ") and texts[-1][6:] in widths:
            width = widths[texts[-1][6:]]
        elif opcode.name == "BINUNICODE" and str(argument).isdigit():
            found[argument] = width
    return found


@pytest.mark.parametrize(
    ("record", "content", "says"),
    [
        ("byteorder", b"middle", "byte order is 'middle'"),
        ("data/1", b"12", "record 'data/1' has 2 bytes, expected"),
        ("data/1", None, "values of a tensor are missing .*data/1"),
        ("data.pkl", b"\x80\x02}.", "holds no module"),
        ("data.pkl", b"\x80\x02", "damaged, cut off or no checkpoint"),
        ("data.pkl", b"", "damaged, cut off or no checkpoint"),
    ],
)
def test_a_damaged_archive_is_refused(archive, record, content, says):
    path = rewrite(archive, lambda name, old: content if name == f"{archive.stem}/{record}" else old)
    with pytest.raises(ValueError, match=f"clip.pt' .*{says}"):
        read_weight_file(path)


def test_a_flipped_bit_is_noticed(archive):
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        info = file.getinfo(f"{archive.stem}/data/1")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", content[info.header_offset + 26 :][:4]))
    content[start] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="CRC"):
        read_weight_file(archive)


def test_a_tensor_larger_than_its_storage_is_refused(archive):
    """Nothing is read beyond a record: torch would grow the storage and hand out whatever memory holds."""

    def grow(name: str, content: bytes) -> bytes:
        if not name.endswith("/data.pkl"):
            return content
        assert content.count(b"(K\x02K\x04t") + content.count(b"K\x02K\x04\x86") >= 1
        return content.replace(b"(K\x02K\x04t", b"(K\xffK\xfft").replace(b"K\x02K\x04\x86", b"K\xffK\xff\x86")

    with pytest.raises(ValueError, match=r"is damaged: a tensor needs \d+ values, its storage has"):
        read_weight_file(rewrite(archive, grow))


def test_an_archive_packed_anew_says_so(archive):
    with zipfile.ZipFile(archive) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in records.items():
            file.writestr(name, content)
    with pytest.raises(ValueError, match="packed anew by a zip program"):
        read_weight_file(archive)


def test_a_frozen_archive_is_told(tmp_path):
    torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval())).save(str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match="without parameters: it was frozen"):
        read_weight_file(tmp_path / "a.pt")


@pytest.mark.parametrize("wide", [False, True])
def test_modules_that_contain_each_other_come_to_an_end(tmp_path, wide):
    """A cycle, and a chain of pairs with 2^60 paths through it."""
    torch.jit.script(nn.Sequential(nn.Linear(1, 1))).save(str(tmp_path / "a.pt"))
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        root = next(argument for _, argument, _ in pickletools.genops(file.read("a/data.pkl")) if argument != 2)
    name = b"c" + root.replace(" ", "\n").encode() + b"\n)\x81"
    if wide:
        content = name + b"}b" + b"q\x01"
        for _ in range(60):
            content += b"0" + name + b"}(X\x01\x00\x00\x00ah\x01X\x01\x00\x00\x00bh\x01ubq\x01"
    else:
        content = name + b"q\x00}X\x01\x00\x00\x00ah\x00sb"
    path = rewrite(
        tmp_path / "a.pt", lambda name, old: b"\x80\x02" + content + b"." if name.endswith("/data.pkl") else old
    )
    with pytest.raises(ValueError, match="modules contain each other"):
        read_weight_file(path)


# ---- files that want to run something ----


class Calls:
    """A pickle of it calls a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def bombs(trap: Path) -> dict[str, object]:
    """Objects that would make the folder `trap`, each in its own way."""
    make = Calls(os.mkdir, str(trap))
    inner = io.BytesIO()
    torch.save({"x": make}, inner, _use_new_zipfile_serialization=False)
    code = f"__import__('os').mkdir({str(trap)!r})"
    return {
        "os": make,
        "system": Calls(os.system, f"mkdir '{trap}'"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(getattr, "x", "upper"),
        "hidden in a storage": Calls(torch.storage._load_from_bytes, inner.getvalue()),
        "raw pickle in a storage": Calls(torch.storage._load_from_bytes, pickle.dumps(make)),
        "torch.load": Calls(torch.load, str(trap)),
        "object array": np.array([make, None], dtype=object),
        "copyreg": Calls(__import__("copyreg")._reconstructor, Path, object, None),
        "numpy.load": Calls(np.load, str(trap)),
    }


BOMBS = list(bombs(Path("x")))


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("wrapping", ["zip", "legacy", "pickle 0", "pickle 2", "pickle 4", "torchscript"])
def test_a_malicious_file_is_refused_and_does_nothing(tmp_path, wrapping, bomb):
    trap, path = tmp_path / "trap", tmp_path / "a.pth"
    content = {"model": {"a": torch.ones(2) if wrapping in ("zip", "legacy") else np.ones(2)}, "x": bombs(trap)[bomb]}
    if wrapping == "torchscript":
        path = tmp_path / "a.pt"
        torch.jit.script(nn.Linear(1, 1)).save(str(path))
        rewrite(path, lambda name, old: pickle.dumps(content, 2) if name.endswith("/data.pkl") else old)
    elif wrapping.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, int(wrapping[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=wrapping == "zip")
    for reader in (read_weight_file, read_plain_data):
        with pytest.raises(ValueError, match="refused|damaged") as error:
            reader(path)
        if bomb not in ("raw pickle in a storage",):
            assert isinstance(error.value, UnsafeFileError), error.value
    assert not trap.exists()


@pytest.mark.parametrize("bomb", ["os", "eval"])
def test_code_in_a_torchscript_module_is_refused_where_only_an_attribute_wants_it(archive, tmp_path, bomb):
    """OpenAI's archives are opened whatever they hold beside weights; a call hidden among that is still refused."""
    trap = tmp_path / "trap"
    call = pickle.dumps(bombs(trap)[bomb], 2)[2:-1]

    marker = b"X\x08\x00\x00\x00training"

    def plant(name: str, content: bytes) -> bytes:
        if not name.endswith("/data.pkl"):
            return content
        place = content.index(marker)
        return content[:place] + b"X\x04\x00\x00\x00evil" + call + content[place:]

    path = rewrite(archive, plant)
    with pytest.raises(UnsafeFileError, match=r"wants to call .*nothing of it was run"):
        read_weight_file(path)
    assert not trap.exists()


def test_a_whole_pickled_module_is_refused_with_advice(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "a.pth")
    with pytest.raises(
        UnsafeFileError, match=r"wants to call 'torch.nn.modules.linear.Linear'.*save only the state dict"
    ):
        read_weight_file(tmp_path / "a.pth")


@pytest.mark.parametrize("key", ["../x", "/etc/hosts", "a/../../x", "", "x.y"])
def test_values_outside_the_archive_are_not_looked_for(tmp_path, key):
    path = tmp_path / "a.pt"
    torch.jit.script(nn.Linear(1, 1)).save(str(path))
    text = key.encode()
    persistent = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + struct.pack("<I", len(text)) + text
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + persistent + b"X\x03\x00\x00\x00cpuK\x01tQK\x00)))tR"
    content = b"\x80\x02c__torch__.torch.nn.modules.linear\nLinear\n)\x81}X\x06\x00\x00\x00weight" + tensor + b"sb."
    rewrite(path, lambda name, old: content if name.endswith("/data.pkl") else old)
    with pytest.raises(UnsafeFileError, match="points outside the archive"):
        read_weight_file(path)


@pytest.mark.parametrize("name", ["../evil", "/abs", "a\\..\\b", "C:\\x", "a/../../b"])
def test_archives_with_records_outside_themselves_are_refused(archive, name):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, b"x")
    with pytest.raises(UnsafeFileError, match="points outside the archive"):
        read_weight_file(archive)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_two_records_of_one_name_are_refused(archive):
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(f"{archive.stem}/data.pkl", b"x")
    with pytest.raises(UnsafeFileError, match="two records"):
        read_weight_file(archive)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "instruction BINPERSID"),
        (b"P12\n.", "instruction PERSID"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"(S'ls'\nios\nsystem\n.", "instruction INST"),
        (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "instruction NEWOBJ_EX"),
        (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "wants to call 'collections.OrderedDict'"),
        (b"\x80\x02}}b.", "wants to call 'dict.__setstate__'"),
        (b"\x80\x02c__builtin__\neval\n.", "wants to call '__builtin__.eval'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "wants to call 'os.system'"),
        (b"\x80\x02c__torch__\nThing\n)\x81.", "wants to call '__torch__.Thing'"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00zip\x86R.", "wants to call 'codecs.encode'"),
        (b"\x80\x02ccollections\nOrderedDict.clear\n.", "wants to call 'collections.OrderedDict.clear'"),
    ],
)
def test_instructions_that_plain_data_does_not_need_are_refused(tmp_path, content, says):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UnsafeFileError, match=says):
        read_weight_file(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02R.",
        b"\x80\x02K\x01R.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02(K\x01u.",
        b"\x80\x02h\x05.",
        b"\x80\x02]q\x00h\x00a.",  # a list that contains itself
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",  # nested beyond Python's recursion
        b"\x80\x02}" + b"(" * 9 + b"}]u.",
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.",
        b"\x80\x02cnumpy.core.multiarray\nscalar\n(NNtR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n(NNNNtR.",
        b"\x80\x02ctorch\nFloatStorage\n.",
        b"\x80\x02}X\x01\x00\x00\x00acnumpy\nndarray\n)Rs.",
        b"\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n)Rs.",  # without values
        bytes(range(256)),
        b"\x00" * 600,
    ],
)
def test_nonsense_is_an_error_and_not_a_crash(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="a.pkl' "):
        read_weight_file(tmp_path / "a.pkl")


def test_a_file_with_random_bytes_changed_never_does_more_than_fail(tmp_path):
    path, generator = tmp_path / "a.pkl", np.random.default_rng(0)
    content = pickle.dumps({"model": {"a": np.arange(6.0).reshape(2, 3)}, "n": [1, (2, "x")]}, 4)
    for _ in range(400):
        changed = bytearray(content)
        for place in generator.integers(2, len(content), 3):
            changed[place] = generator.integers(256)
        path.write_bytes(changed)
        try:
            read_weight_file(path)
        except ValueError:
            continue


# ---- files that claim what is not there, or would bring down a reader ----


def planted(tmp_path: Path, wrapping: str, content: bytes) -> Path:
    """A file of one of three formats with this pickle in it."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=wrapping == "zip")
    if wrapping == "zip":
        return rewrite(path, lambda name, old: content if name.endswith("/data.pkl") else old)
    if wrapping == "legacy":
        *start, _, keys = pickles(path.read_bytes())
        content = b"".join([*start, content, keys])
    path.write_bytes(content)
    return path


def pickles(content: bytes) -> list[bytes]:
    """The five pickles of a torch.save file before torch 1.6."""
    stream, found = io.BytesIO(content), []
    for _ in range(5):
        start = stream.tell()
        list(pickletools.genops(stream))
        found.append(content[start : stream.tell()])
    return found


@pytest.mark.parametrize("wrapping", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s.",  # torch.load ends the process at the hash of such a key
        b"\x80\x02}" + b")" + b"K\x00\x86" * 300_000 + b"K\x01s.",
        b"\x80\x02c__builtin__\nset\n])" + b"\x85" * 300_000 + b"a\x85R.",
        b"\x80\x02ctorch\nSize\n](ctorch\nSize\n]\x85Re\x85R.",  # would hide how deep it is
        b"\x80\x02}r\xff\xff\xff\x7f",  # a place in the memo that would take 16 GB
        b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.",  # 64 GB of bytes
        b"\x80\x04\x95\xff\xff\xff\xff\x0f\x00\x00\x00.",
        b"\x80\x02ctorch\nFloatTensor\nM\x00\x10\x85R.",  # torch.load hands out what memory holds
        b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    ],
)
def test_a_pickle_that_would_bring_down_its_reader_is_refused(tmp_path, wrapping, content):
    path = planted(tmp_path, wrapping, content)
    for reader in (read_weight_file, read_plain_data):
        with pytest.raises(InputError, match="a.pth' "):
            reader(path)


LONG, FOUR = b"J\x00\x10\x00\x00", b"K\x04"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (FOUR + b"\x85", LONG + b"\x85"),  # shape
        (FOUR, LONG),  # shape and number of values
        (b"K\x01\x85", b"M\xe8\x03\x85"),  # stride
        (b"QK\x00", b"QK\x09"),  # offset
        (FOUR + b"\x85q\x08K\x01", b"\x8a\x05\x00\x00\x00\x00\x10\x85q\x08K\x00"),  # one value 2^36 times
    ],
)
def test_a_tensor_that_claims_more_than_its_file_holds_is_refused(tmp_path, zipped, old, new):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=zipped)
    if zipped:
        rewrite(path, lambda name, content: content.replace(old, new) if name.endswith("/data.pkl") else content)
    else:
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
    with pytest.raises(InputError, match="a.pth' is damaged"):
        read_weight_file(path)


def test_values_that_a_file_claims_and_leaves_out_are_not_taken_from_memory(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(b"".join(pickles(path.read_bytes())[:4]) + b"\x80\x02].")  # no keys of storages
    assert torch.load(path, weights_only=True)["a"].shape == (4,)  # of whatever values
    with pytest.raises(InputError, match="a.pth' is damaged: it does not hold the values"):
        read_weight_file(path)


@pytest.mark.parametrize("key", ["../b", "/etc/hosts", "", "x.y"])
def test_a_tensor_of_torch_is_not_looked_for_outside_its_file_either(tmp_path, key):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(4.0)}, path)
    text = b"X" + struct.pack("<I", len(key)) + key.encode()
    rewrite(path, lambda name, old: old.replace(b"X\x01\x00\x00\x000", text) if name.endswith("/data.pkl") else old)
    with pytest.raises(UnsafeFileError, match="points outside the archive"):
        read_weight_file(path)


DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00%s\x85R"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n)R"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01s}\x86b.",  # an attribute of a class of ours
        b"\x80\x02" + ARRAY + b"(K\x01K\x01\x85" + DTYPE % b"f4" + b"\x89C\x04\x00\x00\x00\x00tb" + b"(tb.",  # twice
        b"\x80\x02" + ARRAY + b"(K\x01K\x01\x85" + DTYPE % b"O8" + b"\x89]tb.",
    ],
)
def test_a_state_that_would_change_what_an_object_is_is_refused(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UnsafeFileError, match="a.pkl' "):
        read_weight_file(tmp_path / "a.pkl")


# ---- files that are something else ----


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.safetensors", "a.pt"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"is empty: .*cut off.*\(0 bytes\)"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page .*Download the file itself"),
        (b"<html>", "is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
            "is a pointer of Git LFS .*git lfs pull",
        ),
        (b'{"error": "not authorised"}', "is a text .*not authorised.*refuses a download"),
        (b"\x1f\x8b\x08rest", r"is a packed archive \(gzip\); unpack it"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, r"is a packed archive \(tar\)"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    ],
)
def test_what_people_mistake_for_weights_is_told(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"CLIP weights '.*{name}' {says}"):
        read_weight_file(tmp_path / name, what="CLIP weights")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pkl", "safetensors", "torchscript"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_of_any_kind_is_told_with_its_size(tmp_path, kind, share):
    path = tmp_path / f"a.{kind if kind in ('pkl', 'safetensors') else 'pth'}"
    state = {f"layer.{index}": torch.randn(40) for index in range(20)}
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({key: value.numpy() for key, value in state.items()}))
    elif kind == "torchscript":
        torch.jit.script(nn.Linear(20, 20)).save(str(path))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"cut off.* \({int(share * len(content))} bytes"):
        read_weight_file(path)


def test_other_zip_archives_are_told(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    with pytest.raises(ValueError, match=r"archive of NumPy arrays \(.npz\)"):
        read_weight_file(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("model.pth", b"x")
    with pytest.raises(ValueError, match="zip archive, but not one that torch wrote"):
        read_weight_file(tmp_path / "a.zip")


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="weights file '.*nowhere.pth' does not exist"):
        read_weight_file(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        read_weight_file(tmp_path)
