"""The graph says what the network says."""

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession, SessionOptions

from eurosat_mlops.core import EurosatError
from eurosat_mlops.export import (
    compile_network,
    export_graph,
    fold_network,
    measure_parity,
    parity_fault,
    prune_network,
    quantize_graph,
)
from eurosat_mlops.models import build_model
from eurosat_mlops.session import answer, open_session
from eurosat_mlops.synthetic import make_synthetic

MEAN, STD = (90.0, 95.0, 100.0), (50.0, 40.0, 30.0)


def shaken(arch: str, **given):
    "A network whose norms have seen data, so that folding has something to do."
    torch.manual_seed(0)
    model = build_model(arch, 10, MEAN, STD, **given)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def tiles():
    return make_synthetic(per_class=8, seed=3).tiles


@pytest.fixture(scope="module")
def model():
    return shaken("tilenet_s")


@pytest.fixture(scope="module")
def graph(model):
    return export_graph(model, 1.7, 64)


def expected(model, tiles, temperature=1.7):
    with torch.inference_mode():
        batch = torch.from_numpy(tiles)
        return torch.softmax(model(batch) / temperature, -1).numpy(), model.embed(batch).numpy()


def test_folding_changes_no_value_and_not_the_network(model, tiles):
    before = {n: v.clone() for n, v in model.state_dict().items()}
    folded = fold_network(model)
    with torch.inference_mode():
        batch = torch.from_numpy(tiles)
        assert torch.allclose(folded(batch), model(batch), atol=1e-4)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_a_norm_that_turns_signs_is_not_folded_past_the_pooling(tiles):
    model = shaken("tilenet_s")
    with torch.no_grad():
        model.trunk.stages[1].norm.weight[3] *= -1
    p, _ = answer(open_session(export_graph(model, 1.0, 64)), tiles)
    assert p == pytest.approx(expected(model, tiles, 1.0)[0], abs=1e-4)


@pytest.mark.parametrize("count", [0, 1, 3, 80])
def test_the_graph_is_the_network_at_any_batch(model, graph, tiles, count):
    p, embedding = answer(open_session(graph), tiles[:count])
    assert p.shape == (count, 10) and embedding.shape == (count, 128)
    if count:
        wanted = expected(model, tiles[:count])
        assert p == pytest.approx(wanted[0], abs=1e-5) and embedding == pytest.approx(wanted[1], abs=1e-3)
        assert p.sum(1) == pytest.approx(np.ones(count), abs=1e-5)


def test_the_graph_is_the_same_each_time_and_names_no_file(model, graph, project):
    assert export_graph(model, 1.7, 64) == graph
    assert b"site-packages" not in graph and str(project).encode() not in graph and b".py" not in graph
    loaded = onnx.load_from_string(graph)
    assert loaded.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert all(initializer.data_location == onnx.TensorProto.DEFAULT for initializer in loaded.graph.initializer)


@pytest.mark.parametrize(
    "arch, size", [("resnet18", 64), ("mobilenetv3_small_050", 64), ("vit_tiny_patch16_224", 64), ("tilenet_s", 32)]
)
def test_other_networks_and_sizes_export_and_quantize(arch, size):
    model = shaken(arch, size=size)
    tiles = make_synthetic(per_class=4, size=size, seed=1).tiles
    graph = export_graph(model, 1.0, size)
    p, embedding = answer(open_session(graph), tiles)
    assert p == pytest.approx(expected(model, tiles, 1.0)[0], abs=1e-4) and embedding.shape[0] == 40
    small = quantize_graph(graph, tiles)
    assert len(small) < 0.6 * len(graph) and np.isfinite(answer(open_session(small), tiles)[0]).all()


def test_the_int8_graph_takes_bytes_as_they_are(graph, tiles):
    small = quantize_graph(graph, tiles)
    kinds = [node.op_type for node in onnx.load_from_string(small).graph.node]
    assert "Sub" not in kinds and "Cast" not in kinds, "the input is not rounded again"
    assert kinds.count("Softmax") == kinds.count("Gemm") == 1 and kinds[-1] == "Softmax", "the head is fp32"
    assert quantize_graph(graph, tiles) == small
    p, p8 = answer(open_session(graph), tiles)[0], answer(open_session(small), tiles)[0]
    assert np.abs(p - p8).max() < 0.1
    assert len(small) < 0.35 * len(graph)


def test_the_runtime_computes_every_convolution_in_int8(graph, tiles, tmp_path):
    "A bias whose scale does not follow from its input's would leave a convolution in floating point, unseen."
    dim = (tiles // 2 + 40).astype(np.uint8)  # activations that do not fill the range
    options = SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    InferenceSession(quantize_graph(graph, dim), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 7 and "Conv" not in kinds and "FusedConv" not in kinds


def test_a_graph_with_a_subtraction_for_each_channel_keeps_it(tiles):
    model = shaken("tilenet_s")
    model.mean.copy_(torch.tensor(MEAN).view(1, -1, 1, 1))
    small = quantize_graph(export_graph(model, 1.0, 64), tiles)
    assert "Sub" in [node.op_type for node in onnx.load_from_string(small).graph.node]
    assert np.abs(answer(open_session(small), tiles)[0] - expected(model, tiles, 1.0)[0]).max() < 0.1


def test_parity_is_judged_by_its_limits():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), 1000)
    labels = p.argmax(1)
    other = p.copy()
    other[:6] = np.roll(other[:6], 1, axis=1)
    found = measure_parity(p, other, labels)
    assert found["agreement"] == 0.994 and found["accuracy_loss"] == pytest.approx(0.006)
    assert "0.60 points" in parity_fault("int8", found)
    assert "99.40 %" in parity_fault("int8", found | {"accuracy_loss": 0.0})
    assert parity_fault("int8", found | {"accuracy_loss": 0.0, "agreement": 0.996}) == ""
    assert parity_fault("fp32", found) and not parity_fault("fp32", measure_parity(p, p + 5e-5, labels))


def test_pruning_leaves_a_smaller_network_that_trains(model, tiles):
    pruned = prune_network(model, 0.5, 64)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model, pruned)]
    assert sizes[1] < 0.5 * sizes[0]
    loss = pruned(torch.from_numpy(tiles)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())
    with pytest.raises(EurosatError, match="prune"):
        prune_network(model, 0.0, 64)


def test_the_compiled_network_says_the_same(model, tiles):
    compiled = compile_network(model, tiles[:1])
    if compiled is None:
        pytest.skip("no C++ compiler here")
    with torch.inference_mode():
        batch = torch.from_numpy(tiles[:1])
        assert torch.allclose(compiled(batch), model(batch), atol=1e-4)


def test_a_flipped_bit_goes_unseen_by_the_runtime_alone(graph):
    "Why a bundle's hashes come first."
    rng, opened = np.random.default_rng(0), 0
    for _ in range(20):
        bad = bytearray(graph)
        bad[rng.integers(len(bad) // 2, len(bad))] ^= 1 << int(rng.integers(8))
        try:
            InferenceSession(bytes(bad), providers=["CPUExecutionProvider"])
            opened += 1
        except Exception:
            continue
    assert opened > 10
