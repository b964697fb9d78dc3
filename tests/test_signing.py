"""Signatures: what holds, what does not, and that nothing of a private key gets out."""

import base64
import json
import shutil
import sys
from pathlib import Path

import pytest

from eurosat_mlops.bundle import verify_bundle
from eurosat_mlops.core import EurosatError, log_to, sha256_file
from eurosat_mlops.registry import Registry, find_problems
from eurosat_mlops.signing import make_key_pair, sign_bundle, sign_version, verify_signature, verify_version

pytest.importorskip("model_signing", reason="signing is an extra: pip install 'eurosat-mlops[sign]'")
Keys = tuple[Path, Path]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_key_pair(tmp_path / "keys")


@pytest.fixture
def bundle(bundle_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle_folder, tmp_path / "bundle")


def renew_manifest(folder: Path) -> None:
    "What somebody with write access does after a change: all hashes are right again."
    names = sorted(p.name for p in folder.iterdir() if p.name != "MANIFEST.sha256")
    (folder / "MANIFEST.sha256").write_text("".join(f"{sha256_file(folder / name)}  {name}\n" for name in names))


def test_a_signature_holds_for_the_same_bytes_anywhere(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    before = sorted(p.name for p in bundle.iterdir())
    signature = sign_bundle(bundle, keys[0])
    assert sorted(p.name for p in bundle.iterdir()) == before, "the signature lies outside the bundle"
    elsewhere = shutil.copytree(bundle, tmp_path / "another-name")
    assert verify_signature(elsewhere, signature, keys[1]) == verify_bundle(bundle)


def test_a_bundle_that_was_made_anew_is_not_what_was_signed(bundle: Path, keys: Keys) -> None:
    signature = sign_bundle(bundle, keys[0])
    content = bytearray((bundle / "model.onnx").read_bytes())
    content[100] ^= 1
    (bundle / "model.onnx").write_bytes(content)
    with pytest.raises(EurosatError, match="manifest"):
        verify_signature(bundle, signature, keys[1])
    renew_manifest(bundle)
    verify_bundle(bundle)
    with pytest.raises(EurosatError, match="other content"):
        verify_signature(bundle, signature, keys[1])


@pytest.mark.parametrize("name", [".gitattributes", ".gitignore", "extra.bin"])
def test_a_file_that_the_library_would_overlook_is_refused(name: str, bundle: Path, keys: Keys) -> None:
    signature = sign_bundle(bundle, keys[0])
    (bundle / name).write_text("x")
    with pytest.raises(EurosatError, match="not listed"):
        verify_signature(bundle, signature, keys[1])
    renew_manifest(bundle)
    with pytest.raises(EurosatError, match="other content"):
        verify_signature(bundle, signature, keys[1])


def test_a_damaged_bundle_is_not_signed(bundle: Path, keys: Keys) -> None:
    (bundle / "card.md").write_text("trust me")
    with pytest.raises(EurosatError, match=r"card\.md"):
        sign_bundle(bundle, keys[0])


def test_a_signature_of_another_key_does_not_hold(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    other, _ = make_key_pair(tmp_path / "keys", "other")
    with pytest.raises(EurosatError, match="another key"):
        verify_signature(bundle, sign_bundle(bundle, other), keys[1])


def test_a_signature_that_was_altered_does_not_hold(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    signature = sign_bundle(bundle, keys[0])
    other, _ = make_key_pair(tmp_path / "keys", "other")
    good, forged = json.loads(signature), json.loads(sign_bundle(bundle, other))
    payload = base64.b64decode(good["dsseEnvelope"]["payload"])
    altered = json.loads(signature)
    altered["dsseEnvelope"]["payload"] = base64.b64encode(payload.replace(b"bundle", b"bundlE")).decode()
    hinted = forged | {"verificationMaterial": good["verificationMaterial"]}  # another key's, labelled as ours
    unhinted = json.loads(json.dumps(forged))
    del unhinted["verificationMaterial"]["publicKey"]["hint"]
    empty = json.loads(signature)
    empty["dsseEnvelope"]["signatures"] = []
    for bad in (altered, hinted, unhinted, empty, {}, [], "signature", None):
        with pytest.raises(EurosatError, match="the signature does not hold"):
            verify_signature(bundle, json.dumps(bad).encode(), keys[1])
    for raw in (b"", b"junk", b"\xff\xfe", signature[:-20]):
        with pytest.raises(EurosatError, match="the signature does not hold: it is damaged"):
            verify_signature(bundle, raw, keys[1])


def test_keys_that_are_none_are_named_and_not_shown(
    bundle: Path, keys: Keys, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    (tmp_path / "junk").write_text("junk")
    signature = sign_bundle(bundle, keys[0])
    unusable = {}
    for name, key in {
        "rsa": rsa.generate_private_key(65537, 2048),
        "k1": ec.generate_private_key(ec.SECP256K1()),
    }.items():
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        unusable[name] = (tmp_path / f"{name}.key", tmp_path / f"{name}.pub")
        unusable[name][0].write_bytes(private)
        unusable[name][1].write_bytes(public)
    run = tmp_path / "run"
    run.mkdir()
    said = []
    with log_to(run):
        for path in (
            keys[1],
            tmp_path / "junk",
            tmp_path / "missing",
            tmp_path,
            *(pair[0] for pair in unusable.values()),
        ):
            with pytest.raises(EurosatError, match="private key") as refused:
                sign_bundle(bundle, path)
            said.append(str(refused.value))
        for path in (keys[0], tmp_path / "junk", tmp_path / "missing", *(pair[1] for pair in unusable.values())):
            with pytest.raises(EurosatError, match="public key") as refused:
                verify_signature(bundle, signature, path)
            said.append(str(refused.value))
    out, err = capfd.readouterr()
    everything = "".join([out, err, (run / "log.jsonl").read_text(), *said, signature.decode()])
    assert not any(line in everything for line in keys[0].read_text().splitlines()[1:-1])


def test_an_encrypted_key_needs_its_password(bundle: Path, tmp_path: Path) -> None:
    private, public = make_key_pair(tmp_path / "keys", password="correct horse")
    for wrong in ("", "battery staple"):
        with pytest.raises(EurosatError, match="password") as refused:
            sign_bundle(bundle, private, wrong)
        assert "staple" not in str(refused.value)
    assert verify_signature(bundle, sign_bundle(bundle, private, "correct horse"), public)


def test_a_key_is_never_overwritten_and_belongs_to_its_owner(keys: Keys, tmp_path: Path) -> None:
    before = keys[0].read_bytes()
    with pytest.raises(EurosatError, match="a key is here already"):
        make_key_pair(tmp_path / "keys")
    assert keys[0].read_bytes() == before and keys[0].stat().st_mode & 0o077 == 0


def test_the_registry_keeps_the_signature_beside_the_version(bundle: Path, keys: Keys, tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "store"), tmp_path / "cache")
    found = registry.add(bundle)
    with pytest.raises(EurosatError, match="not signed"):
        verify_version(registry, found, keys[1])
    assert sign_version(registry, found[:12], keys[0]) == found
    assert verify_version(Registry(registry.url, registry.cache), found, keys[1]) == found
    assert not find_problems(registry), "a signature is nothing foreign in the store"
    other, other_public = make_key_pair(tmp_path / "keys", "other")
    sign_version(registry, found, other)
    assert verify_version(registry, found, other_public) == found
    with pytest.raises(EurosatError, match="another key"):
        verify_version(registry, found, keys[1])


def test_without_the_extra_it_is_named(bundle: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for call in (lambda: sign_bundle(bundle, keys[0]), lambda: make_key_pair(keys[0].parent, "more")):
        with pytest.raises(EurosatError, match=r"pip install 'eurosat-mlops\[sign\]'"):
            call()
