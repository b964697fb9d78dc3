"""The page in a real Chromium, over the real service: what people do, and that nothing leaves the machine."""

import asyncio
import io
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'eurosat-mlops[dev]' brings playwright")

from eurosat_mlops.bands import IMAGE_RGB, class_colours, class_title, contract_to_dict  # noqa: E402  # noqa: E402
from eurosat_mlops.bundle import Bundle, read_bundle, update_bundle  # noqa: E402
from eurosat_mlops.core import Settings  # noqa: E402
from eurosat_mlops.engine import Engine, open_model  # noqa: E402
from eurosat_mlops.journal import Journal, open_journal  # noqa: E402
from eurosat_mlops.page import PAGE_FILES, PAGE_POLICY, file_url, page_html, page_words  # noqa: E402
from eurosat_mlops.problems import ServeConfig, hash_key, new_key  # noqa: E402
from eurosat_mlops.registry import open_registry  # noqa: E402
from eurosat_mlops.serve import make_app  # noqa: E402

BROWSER = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
VIEWS = ("classify", "models", "status")
KEY = new_key()


@dataclass(frozen=True)
class Running:
    url: str
    bundle: Bundle  # that answers at the start
    other: str  # id of another one
    journal: Journal


@contextmanager
def running(place: Path, folder: Path, **limits: Any) -> Iterator[Running]:
    "The whole service on a free port, with two versions in its registry."
    settings = Settings(place, models_dir=place / "models", log_level="ERROR")
    copy = shutil.copytree(folder, place / "other")
    update_bundle(copy, {"created": "2026-01-01T00:00:00Z"}, {})
    registry = open_registry(settings)
    bundle, other = read_bundle(folder), [registry.add(each) for each in (folder, copy)][1]
    journal, started, stop = open_journal(str(place / "journal.db")), threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        async def serve() -> None:
            engine = Engine(settings, open_model(folder, settings), threads=1)
            app = make_app(ServeConfig(keys=(hash_key(KEY),), **limits), engine, journal)
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
            stop.append(lambda: setattr(server, "should_exit", True))
            started.set()
            await server.serve(sockets=[listening])
            await app.state.service.close()

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        assert started.wait(20)
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}/", bundle, other, journal)
        finally:
            stop[0]()
            thread.join()


@pytest.fixture(scope="module")
def service(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service"), bundle_folder) as service:
        yield service


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    "Debian's Chromium, else the one that `playwright install chromium` fetched."
    found = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=found, args=BROWSER)
        except playwright.Error as error:
            pytest.skip(f"no Chromium: apt-get install chromium, or playwright install chromium ({str(error)[:80]})")
        yield browser
        browser.close()


@dataclass
class Visit:
    "A person at the page; when they leave, the console must be clean and nobody else been asked."

    page: Any
    refusals: set[int] = field(default_factory=set)  # HTTP statuses that this visit provokes

    def open(self, service: Running, view: str = "classify") -> "Visit":
        self.page.goto(f"{service.url}#{view}")
        self.page.wait_for_selector("#mosaic img", state="attached")
        return self

    def give(self, *files: Path | dict[str, Any]) -> None:
        "Choose files and wait for their answers."
        self.page.set_input_files("#files", files)
        for k in range(len(files)):
            self.page.wait_for_selector(f"#cards > li:nth-child({k + 1}):not([data-state=wait])")

    def part(self, name: str, card: int = 1) -> Any:
        return self.page.locator(f"#cards > li:nth-child({card}) [data-part={name}]")


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    "Start a visit; `options` are those of a browser context, such as color_scheme."
    visits: list[tuple[Visit, Any, list[str], list[str]]] = []

    def start(service: Running, view: str = "classify", **options: Any) -> Visit:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        page, said, asked = context.new_page(), list[str](), list[str]()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        visits.append((Visit(page), context, said, asked))
        return visits[-1][0].open(service, view)

    yield start
    for visited, context, said, asked in visits:
        context.close()
        expected = "|".join(str(status) for status in visited.refusals) or "none"
        assert [text for text in said if not re.search(rf"status of ({expected})|net::ERR_INTERNET", text)] == []
        assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:"))] == []


def picture(tile: np.ndarray, name: str = "tile.png", form: str = "PNG") -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(tile).save(file, form)
    return {"name": name, "mimeType": f"image/{form.lower()}", "buffer": file.getvalue()}


def golden(service: Running) -> tuple[np.ndarray, list[str]]:
    "Tiles, and the titles of their classes."
    arrays, classes = service.bundle.reference, service.bundle.classes
    return arrays["golden_tiles"], [class_title(classes[label]) for label in arrays["golden_labels"]]


def test_an_upload_is_answered_with_words_and_bars(visit: Callable[..., Visit], service: Running) -> None:
    tiles, titles = golden(service)
    here = visit(service)
    here.give(*(picture(tile, f"{k}.png") for k, tile in enumerate(tiles[:3])))
    assert here.page.locator("#cards > li").count() == 3
    for k in range(3):
        assert (
            here.part("name", k + 1).inner_text() == titles[k] and here.part("file", k + 1).inner_text() == f"{k}.png"
        )
        assert here.part("tags", k + 1).inner_text() in ("Sure", "Unfamiliar")  # golden tiles are certain ones
        rows = here.part("bars", k + 1).locator("li").all_inner_texts()
        assert len(rows) == 5 and rows[0].startswith(titles[k])
    widths = here.part("bars").locator(".fill").evaluate_all("fills => fills.map(fill => fill.clientWidth)")
    assert widths == sorted(widths, reverse=True)
    fill = here.part("bars").locator(".fill").first.evaluate("fill => getComputedStyle(fill).backgroundColor")
    colour = class_colours(service.bundle.classes)[
        [class_title(name) for name in service.bundle.classes].index(titles[0])
    ]
    assert fill == f"rgb{tuple(bytes.fromhex(colour[1:]))}"
    assert here.page.locator("#summary").inner_text().startswith("3 pictures: ")
    assert here.part("image").evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_every_example_is_answered_as_it_was_promised(visit: Callable[..., Visit], service: Running) -> None:
    here, (tiles, titles) = visit(service), golden(service)
    buttons = here.page.locator("#mosaic button")
    assert [label.split(": ")[1] for label in buttons.evaluate_all("all => all.map(one => one.ariaLabel)")] == titles
    for k in range(len(tiles)):
        buttons.nth(k).click()
        here.page.wait_for_selector(f"#cards:has(> li:nth-child({k + 1})) > li:first-child:not([data-state=wait])")
        assert here.part("name").inner_text() == titles[k]


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_pictures_come_by_drop_and_by_paste(event: str, visit: Callable[..., Visit], service: Running) -> None:
    here, content = visit(service), list(picture(golden(service)[0][0])["buffer"])
    make = """([content, event]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(content)], "given.png", {type: "image/png"}));
        const given = {dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true};
        document.body.dispatchEvent(event === "drop" ? new DragEvent(event, given) : new ClipboardEvent(event, given));
    }"""
    here.page.evaluate(make, [content, event])
    here.page.wait_for_selector("#cards > li:not([data-state=wait])")
    assert here.part("name").inner_text() == golden(service)[1][0]


def test_what_is_no_tile_says_so_and_can_be_scaled(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service)
    here.refusals = {415, 422}
    here.give(
        {"name": "notes.png", "mimeType": "image/png", "buffer": b"River"}, picture(np.zeros((96, 96, 3), np.uint8))
    )
    assert "expected a JPEG" in here.part("verdict").inner_text() and here.part("blank").is_visible()
    assert "96 x 96 px" in here.part("verdict", 2).inner_text()
    here.part("again", 2).click()
    here.page.wait_for_selector("#cards > li:nth-child(2):is([data-state=sure], [data-state=doubt])")
    assert here.part("name", 2).inner_text() in map(class_title, service.bundle.classes)
    assert "1 without an answer" in here.page.locator("#summary").inner_text()


def test_no_connection_is_said_in_words(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service)
    here.page.context.set_offline(True)
    here.give(picture(golden(service)[0][0]))
    assert "does not answer" in here.part("verdict").inner_text()
    here.page.context.set_offline(False)
    here.part("again").click()
    here.page.wait_for_selector("#cards > [data-state=sure], #cards > [data-state=doubt]")


def test_what_part_decided_is_on_one_scale(visit: Callable[..., Visit], service: Running) -> None:
    "A flat tile stays as it is, since covering a part of it changes nothing."
    here = visit(service)
    here.give(picture(np.full((64, 64, 3), 90, np.uint8)), picture(golden(service)[0][7]))
    seen = "canvas => canvas.getContext('2d').getImageData(0, 0, 64, 64).data.filter((_, k) => k % 4 === 3)"
    for card in (1, 2):
        assert here.part("heat", card).is_hidden()
        here.part("look", card).click()
        assert here.part("heat", card).is_visible() and here.part("look", card).get_attribute("aria-pressed") == "true"
    strength = [max(here.part("heat", card).evaluate(seen)) for card in (1, 2)]
    assert strength[0] < 10 and strength[1] >= strength[0]
    assert here.part("done").inner_text().startswith("No single part decided")
    here.part("look").click()
    assert here.part("heat").is_hidden()


def test_feedback_lies_beside_the_prediction(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service)
    here.give(picture(golden(service)[0][8]))
    said = here.part("name").inner_text()
    here.part("wrong").click()
    choices = here.page.locator("#choices button").all_inner_texts()
    assert set(choices) == set(map(class_title, service.bundle.classes)) - {said}
    here.page.get_by_role("button", name="Pasture", exact=True).click()
    here.page.wait_for_selector("text=Thank you: noted as Pasture.")
    assert not here.page.locator("#wrong-dialog").is_visible()
    row = list(service.journal.read())[-1]
    assert "Pasture" in str(row) and class_title(row.label) == said


def test_switching_asks_for_a_key_and_keeps_it_in_the_tab(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service, "models")
    here.refusals = {401}
    page = here.page
    page.wait_for_selector(".model")
    assert page.locator(".model").count() == 2 and page.locator(".model[data-active]").count() == 1
    score = service.bundle.info["metrics"]["validation"]["accuracy"]
    assert f"{100 * score['value']:.2f} % right" in page.locator(".model[data-active]").inner_text()
    assert (
        f"{100 * score['low']:.2f} % to {100 * score['high']:.2f} %" in page.locator(".model[data-active]").inner_text()
    )
    page.get_by_role("button", name="Use model").click()
    page.fill("#key", "guess")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=This key is not accepted.")
    page.fill("#key", KEY)
    page.get_by_role("button", name="Use the key").click()
    page.wait_for_selector(f".model[data-active] >> text={service.other[:8]}")
    page.wait_for_selector(f"#serving >> text={service.other[:8]}")
    assert httpx.get(f"{service.url}stats").json()["model"]["version"] == service.other
    assert page.evaluate("[sessionStorage.getItem('key'), localStorage.length, document.cookie]") == [KEY, 0, ""]
    page.get_by_role("button", name="Use model").click()  # back, without being asked again
    page.wait_for_selector(f".model[data-active] >> text={service.bundle.id[:8]}")


def test_the_journal_is_saved_with_a_key(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service)
    here.give(picture(golden(service)[0][1]))
    here.page.click("nav >> text=Status")
    here.page.select_option("#format", "jsonl")
    here.page.click("text=Save the journal")
    here.page.fill("#key", KEY)
    with here.page.expect_download() as saved:
        here.page.keyboard.press("Enter")
    assert saved.value.suggested_filename == "journal.jsonl"
    lines = Path(saved.value.path()).read_text().splitlines()
    assert len(lines) == service.journal.count() and service.bundle.id in lines[-1]


def test_status_is_live(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service, "status")
    shown = here.page.locator("#stat-requests")
    before = httpx.get(f"{service.url}stats").json()["requests"]
    playwright.expect(shown).to_have_text(str(before))
    httpx.post(f"{service.url}predict", content=picture(golden(service)[0][2])["buffer"]).raise_for_status()
    playwright.expect(shown).to_have_text(str(before + 1))
    assert here.page.locator("#stat-p99").inner_text().endswith(" ms")
    counts = here.page.locator("#counts li").all_inner_texts()
    assert len(counts) == len(service.bundle.classes)
    playwright.expect(here.page.locator("#rate")).to_contain_text("requests/s")
    playwright.expect(here.page.locator("#drift li")).to_have_count(3)
    tile = picture(golden(service)[0][2])["buffer"]
    files = [("files", ("tile.png", tile, "image/png"))] * 250
    httpx.post(f"{service.url}predict/batch", files=files, timeout=30).raise_for_status()
    playwright.expect(here.page.locator("#drift")).to_contain_text("changed")  # one tile, 250 times


def test_long_uploads_show_how_far_they_are(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service)
    network = here.page.context.new_cdp_session(here.page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 300_000}
    network.send("Network.emulateNetworkConditions", slow)
    here.page.check("#resize")
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    here.page.set_input_files("#files", [picture(noise, "large.bmp", "BMP")])
    here.page.wait_for_selector("text=/^[1-9][0-9]? % is there/")
    assert 0 < here.part("progress").evaluate("bar => bar.value") < 1
    here.page.wait_for_selector("#cards > :not([data-state=wait])")
    assert here.part("progress").is_hidden() and here.part("confidence").inner_text().endswith("%")


def test_many_at_once(visit: Callable[..., Visit], service: Running) -> None:
    tiles = np.random.default_rng(1).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    here = visit(service)
    here.give(*(picture(tile, f"{k}.png") for k, tile in enumerate(tiles)))
    playwright.expect(here.page.locator("#summary")).to_contain_text("40 pictures: ")
    assert here.part("file", 40).text_content() == "39.png" and here.page.locator("#overall").is_hidden()
    playwright.expect(here.page.locator("#live")).to_contain_text("40 pictures: ")  # once, not forty times
    here.page.click("#clear")
    assert here.page.locator("#cards > li").count() == 0 and here.page.locator("#empty").is_visible()


def test_a_busy_service_is_asked_again_later(visit: Callable[..., Visit], bundle_folder: Path, tmp_path: Path) -> None:
    with running(tmp_path, bundle_folder, rate=12.0) as service:
        headers = {"Content-Type": "image/png"}
        content = picture(golden(service)[0][0])["buffer"]
        while httpx.post(f"{service.url}predict", content=content, headers=headers).status_code == 200:
            pass
        here = visit(service)
        here.refusals = {429}
        here.page.set_input_files("#files", [picture(golden(service)[0][0])])
        here.page.wait_for_selector("text=/next try in \\d+ s/")
        here.page.wait_for_selector("#cards > [data-state=sure], #cards > [data-state=doubt]")
        assert here.part("name").inner_text() in map(class_title, service.bundle.classes)


def test_a_service_with_keys_for_predictions_asks_once(
    visit: Callable[..., Visit], bundle_folder: Path, tmp_path: Path
) -> None:
    with running(tmp_path, bundle_folder, predict_keys=(hash_key("may-ask"),)) as service:
        here = visit(service)
        here.refusals = {401}
        here.page.set_input_files("#files", [picture(tile) for tile in golden(service)[0][:3]])
        here.page.fill("#key", "may-ask")
        here.page.keyboard.press("Enter")
        for k in range(3):
            here.page.wait_for_selector(f"#cards > li:nth-child({k + 1}):is([data-state=sure], [data-state=doubt])")
        assert here.page.locator("#cards > li").count() == 3 and not here.page.locator("#key").is_visible()


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_a_phone(width: int, visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service, viewport={"width": width, "height": 740}, has_touch=True)
    here.give(picture(golden(service)[0][2], "a_very_long_name_without_any_space_in_it_" * 4 + ".png"))
    here.part("look").click()
    for view in VIEWS:
        here.page.evaluate("view => (location.hash = view)", view)
        here.page.wait_for_selector(f"[data-view={view}]:not([hidden])")
        here.page.wait_for_timeout(300)
        assert here.page.evaluate("document.documentElement.scrollWidth") <= width, view
        small = "all => all.filter(e => e.checkVisibility()).map(e => [e.innerText, e.getBoundingClientRect().height])"
        heights = here.page.locator("button, nav a, select, label.button").evaluate_all(small)
        assert [each for each in heights if each[1] < 24] == []


def test_by_keyboard_alone(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service)
    page, focused = here.page, "document.activeElement.{}"
    page.keyboard.press("Tab")
    assert page.evaluate(focused.format("innerText")) == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate(focused.format("id")) == "files"
    ring = "getComputedStyle(document.querySelector('label[for=files]')).outlineStyle"
    assert page.evaluate(ring) == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate(focused.format("ariaLabel")).startswith("Example 1")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cards > li:not([data-state=wait])")
    playwright.expect(page.locator("#live")).to_contain_text(golden(service)[1][0])
    here.part("wrong").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('dialog').id") == "wrong-dialog"
    page.keyboard.press("Escape")
    assert page.evaluate(focused.format("dataset.part")) == "wrong"  # where the reader was


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(scheme: str, visit: Callable[..., Visit], service: Running) -> None:
    "Names, labels, roles, order, contrast: the rules of axe-core, in each view, with answers and in the dialogs."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the dev extra brings axe-core").Axe()
    here = visit(service, color_scheme=scheme, reduced_motion="reduce")
    here.refusals = {422}

    def check() -> None:
        found = axe.run(here.page).response["violations"]
        assert [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found] == []

    check()
    noise = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    here.give(picture(golden(service)[0][0]), picture(noise), picture(np.zeros((96, 96, 3), np.uint8)))
    here.part("look").click()
    check()
    here.part("wrong").click()
    check()
    here.page.click("#wrong-cancel")
    for view, ready in (("models", ".model"), ("status", "#counts li")):
        here.page.click(f"nav a[href='#{view}']")
        here.page.wait_for_selector(ready)
        check()
    here.page.click("text=Save the journal")
    check()


def test_nothing_jumps(visit: Callable[..., Visit], service: Running) -> None:
    "Layout shifts as browsers count them: while it loads, and while answers come in."
    here = visit(service)
    watch = """() => new PerformanceObserver(list => list.getEntries().forEach(shift =>
        window.shifted = (window.shifted ?? 0) + shift.value)).observe({type: "layout-shift", buffered: true})"""
    here.page.evaluate(watch)
    here.page.wait_for_timeout(200)
    assert here.page.evaluate("window.shifted ?? 0") < 0.02
    here.page.set_input_files("#files", [picture(tile) for tile in golden(service)[0][:2]])
    height = here.page.locator("#cards > li").first.bounding_box()["height"]
    here.give()
    here.page.wait_for_selector("#cards > li:nth-child(2):not([data-state=wait])")
    assert here.page.locator("#cards > li").first.bounding_box()["height"] == height


def test_motion_is_left_out_where_it_is_not_wanted(visit: Callable[..., Visit], service: Running) -> None:
    here = visit(service, reduced_motion="reduce")
    here.give(picture(golden(service)[0][0]))
    fill = here.part("bars").locator(".fill").first
    assert fill.evaluate("fill => getComputedStyle(fill).transitionDuration") == "0s"


@pytest.fixture(scope="module")
def pictures(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    "The same network, said to be of ordinary pictures of ten breeds."
    place = tmp_path_factory.mktemp("pictures")
    folder = shutil.copytree(bundle_folder, place / "breeds")
    classes = ["Forest", "a_b", "Écureuil roux", "$x$", "<b>bold</b>", "x" * 80, "猫", *"qrs"]
    changes = {"classes": classes, "contract": contract_to_dict(IMAGE_RGB), "data": BREEDS}
    update_bundle(folder, changes, {})
    with running(place, folder) as service:
        yield service


BREEDS = {"name": "breeds", "split": "stratified", "digest": "0" * 64}


def test_a_model_of_ordinary_pictures_has_words_of_its_own(visit: Callable[..., Visit], pictures: Running) -> None:
    here = visit(pictures)
    assert here.page.title() == "What does this picture show? · breeds picture classifier"
    text = here.page.locator("body").inner_text()
    assert not re.search(r"Sentinel|land|tile| m\b|parcel|River|EuroSAT", text.replace("Forest", ""))
    assert "Scaled to 64 x 64 px" in text and here.page.locator("#scale").is_hidden()
    assert here.page.locator("#legend li").all_inner_texts() == list(pictures.bundle.classes)  # as they are called
    for view in ("models", "status"):
        here.page.click(f"nav a[href='#{view}']")
        here.page.wait_for_selector({"models": ".model", "status": "#drift li"}[view])
        assert not re.search(r"Sentinel|land cover|tile\b|Kinds of land", here.page.locator("main").inner_text())


def test_a_picture_of_another_size_and_shape_is_scaled_unasked(visit: Callable[..., Visit], pictures: Running) -> None:
    here, noise = visit(pictures), np.random.default_rng(0).integers(0, 256, (90, 300, 3), dtype=np.uint8)
    here.give(picture(noise), picture(np.kron(golden(pictures)[0][0], np.ones((9, 9, 1), np.uint8))))
    assert "2 pictures" in here.page.locator("#summary").inner_text()
    assert "without an answer" not in here.page.locator("#summary").inner_text()
    assert here.part("ground").inner_text() == "" and here.part("ground", 2).inner_text() == ""
    here.part("look").click()
    shape = here.part("heat").evaluate("canvas => [canvas.width, canvas.height]")
    assert shape == [213, 64]  # what decided lies over the picture as it is shown, not over a square
    assert here.part("image").evaluate("image => getComputedStyle(image).imageRendering") == "auto"
    here.part("wrong").click()
    assert here.page.locator("#choices button").count() == 9


def test_what_the_service_sends_for_the_page(service: Running) -> None:
    with httpx.Client(base_url=service.url) as client:
        index = client.get("/")
        assert index.headers["content-security-policy"] == PAGE_POLICY and "unsafe" not in PAGE_POLICY
        assert index.text == page_html(page_words(service.bundle)) and not re.search(
            r"<style|style=|<script>|\son\w+=|https?://(?!www.w3.org/2000/svg)", index.text
        )
        assert "set-cookie" not in index.headers
        for name, kind in PAGE_FILES.items():
            answer = client.get(f"/{file_url(name)}")
            assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
            assert "immutable" in answer.headers["cache-control"]
        for path in ("/page/page.py", "/page/examples/99.png", "/page/../pyproject.toml", "/page/%2e%2e%2fcore.py"):
            answer = client.get(path)
            assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"
        assert client.post("/").status_code == 405 and client.get("/predict").status_code == 405
