"""The server: what its pages get, and who gets nothing; a test for each check of `studio.security`."""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mapo_fast.studio.project import Project
from mapo_fast.studio.render import Renderer
from mapo_fast.studio.security import HEADERS, Guard
from mapo_fast.studio.server import Scan, make_app
from mapo_fast.util.errors import UserError
from tests.studio.pictures_of import write_project

cli = importlib.import_module("mapo_fast.cli.studio")  # the package has the command under this name
PORT = 8765
BASE = f"http://127.0.0.1:{PORT}"
SAME = {"sec-fetch-site": "same-origin"}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Guard]:
    with Project.open(write_project(tmp_path / "my <b>pictures")) as project, Renderer() as renderer:
        scan = Scan(project)
        thread = scan.start()
        assert thread is not None
        thread.join()
        yield make_app(project, renderer, scan, PORT, ("tunnel.example:443",))


@pytest.fixture
def client(app: Guard) -> TestClient:
    """A browser that has come in by the one-time address."""
    client = TestClient(app, base_url=BASE)
    assert client.get(f"/enter?token={app.once}").status_code == 200
    return client


def change(app: Guard, **headers: str) -> dict[str, str]:
    given = {**SAME, "origin": BASE, "x-studio-token": app.token, **headers}
    return {name: value for name, value in given.items() if value}


def vote(client: TestClient, app: Guard, pair: str, answer: str = "left") -> Any:
    body = {"tab": "t", "pair": pair, "answer": answer, "seconds": 0.5}
    return client.post("/api/vote", json=body, headers=change(app))


@pytest.mark.slow
def test_a_vote_from_the_first_page_to_the_pairs(app: Guard, client: TestClient, tmp_path: Path) -> None:
    page = client.get("/", headers={"sec-fetch-site": "none"})
    assert page.status_code == 200
    assert "<script src=" in page.text
    state = client.get("/api/state", headers=SAME).json()
    assert (state["pictures"], state["prompts"], state["seen"]) == (9, 3, None)
    assert state["name"] == "my <b>pictures"
    shown = client.get("/api/pair?tab=t", headers=SAME).json()
    assert client.get("/api/pair?tab=t", headers=SAME).json() == shown
    for _ in range(3):
        picture = client.get(f"/picture/{shown['pair']['left']}?width=256", headers=SAME)
        assert picture.headers["content-type"] == "image/webp"
        last, ahead = shown["pair"], shown["ahead"]
        shown = vote(client, app, last["id"]).json()
        assert ahead == [shown["pair"]["left"], shown["pair"]["right"]]
    again = vote(client, app, last["id"], "right")
    assert (again.status_code, "\n" in again.json()["error"]) == (409, False)
    assert client.post("/api/undo", json={"tab": "t"}, headers=change(app)).json()["votes"] == 2
    made = client.post("/api/pairs", json={}, headers=change(app)).json()
    assert made["pairs"] == 2
    assert "mapo-fast train --preset lora" in made["command"]
    assert (tmp_path / "my <b>pictures" / "data" / "pairs" / "pairs.jsonl").is_file()


def test_two_tabs_get_two_pairs(client: TestClient) -> None:
    one, other = (client.get(f"/api/pair?tab={tab}", headers=SAME).json()["pair"] for tab in "ab")
    assert one["id"] != other["id"]
    assert client.get("/api/pair", headers=SAME).status_code == 409
    assert client.get(f"/api/pair?tab={'x' * 65}", headers=SAME).status_code == 409


def test_every_answer_has_the_policy(app: Guard, client: TestClient) -> None:
    for path in ("/", "/studio.js", "/api/state", "/nothing", "/enter"):
        answer = client.get(path, headers=SAME)
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, (path, name)
    assert "default-src 'none'" in HEADERS["content-security-policy"]
    assert "unsafe" not in HEADERS["content-security-policy"]


FOREIGN = ["127.0.0.1", "127.0.0.1:1", "evil.example:8765", "127.0.0.1:8765.evil.example"]


@pytest.mark.parametrize("host", [*FOREIGN, "127.0.0.1.evil.example:8765"])
def test_another_host_is_rebinding(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 403


def test_a_tunnels_host_is_allowed_by_name(app: Guard) -> None:
    client = TestClient(app, base_url="http://tunnel.example:443")
    assert client.get(f"/enter?token={app.once}").status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", ""])
def test_another_sites_page_reads_nothing(client: TestClient, site: str) -> None:
    headers = {"sec-fetch-site": site} if site else {}
    for path in ("/api/state", "/api/pair?tab=t", "/picture/1?width=256", "/studio.js"):
        assert client.get(path, headers=headers).status_code == 403, path
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 403


@pytest.mark.parametrize(
    "origin", ["null", "", "http://127.0.0.1:1", "http://evil.example", f"{BASE}.evil.example"]
)
def test_a_change_from_another_origin_is_forgery(app: Guard, client: TestClient, origin: str) -> None:
    answer = client.post(
        "/api/vote", json={"number": 1, "answer": "left"}, headers=change(app, origin=origin)
    )
    assert (answer.status_code, "origin" in answer.text) == (403, True)


@pytest.mark.parametrize("token", ["", "x", "é"])
def test_a_change_needs_the_pages_token(app: Guard, client: TestClient, token: str) -> None:
    headers: dict[str, Any] = {**change(app), "x-studio-token": token.encode()}
    answer = client.post("/api/undo", json={}, headers=headers)
    assert (answer.status_code, "token" in answer.text) == (403, True)


def test_without_the_cookie_nothing_is_told(app: Guard) -> None:
    client = TestClient(app, base_url=BASE)
    for path in ("/", "/api/state", "/picture/1?width=256"):
        assert client.get(path, headers=SAME).status_code == 403
    client.cookies.set(app.cookie, "guess")
    assert client.get("/api/state", headers=SAME).status_code == 403


def test_the_address_works_once_and_the_cookie_is_strict(app: Guard) -> None:
    address = f"/enter?token={app.once}"
    client = TestClient(app, base_url=BASE)
    assert client.get("/enter?token=guess").status_code == 403
    assert client.get("/enter").status_code == 403
    cookie = client.get(address).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert str(PORT) in cookie
    assert TestClient(app, base_url=BASE).get(address).status_code == 403


def test_only_get_and_post_of_bounded_size(app: Guard, client: TestClient) -> None:
    assert client.request("PUT", "/api/vote", headers=change(app)).status_code == 403
    large = client.post("/api/prompt", json={"ids": [], "prompt": "x" * 2**20}, headers=change(app))
    assert (large.status_code, "1 MiB" in large.text) == (403, True)


WRONG = [b"[]", b"{", b"3", b'{"tab": "t", "pair": 1, "answer": "left"}', b'{"tab": "t", "pair": "x"}']
WRONG += [b'{"tab": "t", "pair": "x", "answer": ["left"]}', b'{"pair": "none such", "answer": "left"}']


@pytest.mark.parametrize("body", WRONG)
def test_a_wrong_body_is_one_line(app: Guard, client: TestClient, body: bytes) -> None:
    answer = client.post("/api/vote", content=body, headers=change(app))
    assert answer.status_code in (400, 409)
    assert "\n" not in answer.json()["error"]


PATHS = [
    "../votes.jsonl",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/votes.jsonl",
    "x",
    "999",
    "1?width=3",
    "1?width=-1",
]


@pytest.mark.parametrize("path", PATHS)
def test_pictures_go_by_their_number_alone(client: TestClient, path: str) -> None:
    assert client.get(f"/picture/{path}", headers=SAME).status_code == 404


def test_hostile_texts_stay_texts(app: Guard, client: TestClient) -> None:
    asked: dict[str, Any] = client.get("/api/pictures", headers=SAME).json()
    ids = asked["groups"][0]["ids"]
    hostile = "</script><script>alert(1)</script>"
    answer = client.post("/api/prompt", json={"ids": ids, "prompt": hostile}, headers=change(app))
    assert hostile in [group["prompt"] for group in answer.json()["groups"]]
    assert answer.headers["content-type"] == "application/json"
    script = (Path(str(cli.__file__)).parents[1] / "studio" / "static" / "studio.js").read_text()
    assert "innerHTML" not in script
    assert "insertAdjacent" not in script


def test_the_door_is_the_users_alone(tmp_path: Path) -> None:
    door = tmp_path / "cache" / "open.html"
    cli._write_door(door, "http://127.0.0.1:1/enter?token=abc")
    if os.name == "posix":
        assert stat.S_IMODE(door.stat().st_mode) == 0o600
    (tmp_path / "target").write_text("mine")
    door.unlink()
    door.symlink_to(tmp_path / "target")
    cli._write_door(door, "x")
    assert (tmp_path / "target").read_text() == "mine"


def test_a_port_in_use_is_one_line() -> None:
    with cli._listen(0) as taken:
        taken.listen()
        with pytest.raises(UserError, match=r"--port \d+ cannot be used"):
            cli._listen(taken.getsockname()[1])
    with pytest.raises(UserError, match="--port 99999 cannot be used"):
        cli._listen(99_999)
