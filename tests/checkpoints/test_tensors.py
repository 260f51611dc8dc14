"""safetensors by their header: what the library writes is read as the library reads it, in the file's order, once."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.tensors import SAFETENSORS_DTYPES, SafetensorsFile, open_safetensors

TENSORS = {
    **{f"of {dtype}": torch.randn(3, 5).mul(9).to(dtype) for dtype in SAFETENSORS_DTYPES.values()},
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 4),
    "images": torch.randn(2, 3, 4, 4, dtype=torch.bfloat16),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", {"format": "pt", "prediction": "v"})
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("read", [SafetensorsFile.iter_tensors, SafetensorsFile.map_tensors])
def test_tensors_are_the_library_s(path, read):
    expected, found = load_file(path), dict(read(open_safetensors(path)))
    assert found.keys() == expected.keys() == TENSORS.keys()
    for name, a in found.items():
        assert a.dtype == expected[name].dtype and a.shape == expected[name].shape
        assert a.reshape(-1).view(torch.uint8).tolist() == expected[name].reshape(-1).view(torch.uint8).tolist(), name


def test_the_header_tells_all_but_the_values(path):
    file = open_safetensors(path)
    assert file.metadata == {"format": "pt", "prediction": "v"}
    meta = file.meta_tensors()
    assert all(a.is_meta and (a.shape, a.dtype) == (TENSORS[n].shape, TENSORS[n].dtype) for n, a in meta.items())
    assert meta.keys() == TENSORS.keys()


def test_tensors_come_in_the_file_s_order(path):
    file = open_safetensors(path)
    assert [name for name, _ in file.iter_tensors()] == sorted(
        file.tensor_infos, key=lambda n: file.tensor_infos[n][2:]
    )


def test_the_hash_is_the_file_s(path):
    hasher = hashlib.sha256()
    for _ in open_safetensors(path).iter_tensors(hasher):
        pass
    assert hasher.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_tensor_shares_memory_with_another(path):
    found = [a for _, a in open_safetensors(path).iter_tensors() if a.numel()]
    assert len({a.untyped_storage().data_ptr() for a in found}) == len(found)


@pytest.mark.parametrize("read", [SafetensorsFile.iter_tensors, SafetensorsFile.map_tensors])
def test_a_file_that_shrinks_while_it_is_read_is_told(path, read):
    file = open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.safetensors: ends before the last byte of "):
        for _ in read(file):
            pass
