import json

import pytest

from dipper.sheets import Book, Measured, Sheet
from samples import write_samples


def perplexity(method, nll, *, tokens="ab", n_tokens=200, state="done", **options):
    """A cell of two windows, the second one harder."""
    return Measured(
        kind="perplexity",
        options={"method": method, **options},
        result={
            "method": method["name"], "tokens_sha256": tokens, "window": 101, "n_tokens": n_tokens,
            "window_nll": [100 * nll, 110 * nll], "window_tokens": [100, 100],
        },
        state=state,
    )  # fmt: skip


def sheet(name, *cells):
    return Sheet(experiment=name, model="small", title="Small", cells=cells)


DENSE = {"name": "dense"}
DIP = {"name": "dip"}
CACHED = {"name": "dip-ca", "gamma": 0.5}


def test_a_loss_is_beside_the_dense_cell_of_the_same_sheet():
    mine, other = perplexity(DENSE, 3.0, state="stale"), perplexity(DENSE, 2.9)
    dip = perplexity(DIP, 3.1, density=0.5)
    with_its_own = sheet("split", mine, dip)
    book = Book({}, [sheet("density", other), with_its_own])
    assert book.dense(with_its_own, dip) is mine
    alone = Book({}, [sheet("split", mine, dip)])
    assert book.loss(with_its_own, dip) == pytest.approx(alone.loss(alone.sheets("split")[0], dip))


def test_without_one_it_is_beside_another_sheets_rather_one_that_is_not_stale():
    stale, fresh = perplexity(DENSE, 3.0, state="stale"), perplexity(DENSE, 2.9)
    dip = perplexity(DIP, 3.1, density=0.5)
    mine = sheet("split", dip)
    others = [sheet("caches", stale), sheet("density", fresh)]
    assert Book({}, [*others, mine]).dense(mine, dip) is fresh
    assert Book({}, [others[0], mine]).dense(mine, dip) is stale
    elsewhere = sheet("density", perplexity(DENSE, 2.9, tokens="cd"))
    assert Book({}, [elsewhere, mine]).loss(mine, dip) is None


def test_the_dense_cell_itself_has_no_loss():
    dense = perplexity(DENSE, 3.0)
    mine = sheet("density", dense)
    assert Book({}, [mine]).loss(mine, dense) is None


def test_the_loss_of_dip_ca_is_with_half_of_the_columns_cached():
    half = perplexity({**CACHED, "capacity": 0.5}, 3.1, density=0.5)
    quarter = perplexity({**CACHED, "capacity": 0.25}, 3.2, density=0.5, tokens="cd", n_tokens=1000)
    dense = [perplexity(DENSE, 3.0), perplexity(DENSE, 3.0, tokens="cd", n_tokens=1000)]
    mine = sheet("cache-aware", *dense, half, quarter)
    book = Book({}, [mine])
    loss, cells = book.loss_of("small", "dip-ca", 0.5, 0.5)
    assert loss == book.loss(mine, half)
    assert cells == (half, dense[0])
    without = Book({}, [sheet("cache-aware", *dense, quarter)])
    assert without.loss_of("small", "dip-ca", 0.5, 0.5) == (None, ())


def test_the_loss_of_dip_is_that_on_the_most_tokens_whatever_is_cached():
    few = perplexity({**DIP, "capacity": 0.5}, 3.1, density=0.5)
    many = perplexity({**DIP, "capacity": 0.25}, 3.2, density=0.5, tokens="cd", n_tokens=1000)
    dense = [perplexity(DENSE, 3.0), perplexity(DENSE, 3.0, tokens="cd", n_tokens=1000)]
    book = Book({}, [sheet("cache-aware", *dense, few, many)])
    assert book.loss_of("small", "dip", 0.5, None)[1] == (many, dense[1])


def test_a_benchmark_ran_on_the_held_disk_if_it_was_asked_to_or_says_so():
    def held(options, result):
        return Measured(kind="benchmark", options=options, result=result).held

    assert held({"script": "s", "arguments": ["--held"]}, None)
    assert held({"script": "s"}, {"held": True})
    assert not held({"script": "s"}, {"held": False})
    assert not held({"script": "s", "arguments": ["--tokens"]}, None)


def test_stale_results_are_marked_where_they_are_shown():
    done, stale = perplexity(DIP, 3.0), perplexity(DIP, 3.1, state="stale")
    missing = Measured(kind="perplexity", options={}, result=None, state="missing")
    assert sheet("density", done, missing).marked == "Small"
    assert sheet("density", done, stale).marked == "Small (partly stale)"
    assert sheet("density", stale, missing).marked == "Small (stale)"


def test_of_a_model_that_no_experiment_asks_for_what_is_there_is_shown(tmp_path):
    folder = write_samples(tmp_path / "e")
    path = folder / "results" / "density-small.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"] |= {"name": "unasked", "title": "Unasked"}
    n = len(content["cells"]) - 2
    content["cells"] = content["cells"][:n]
    (folder / "results" / "density-unasked.json").write_text(json.dumps(content), encoding="utf-8")
    found = Book.open(folder).sheets("density")[-1]
    assert (found.model, len(found.cells), found.count("missing")) == ("unasked", n, 0)
