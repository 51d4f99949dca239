"""What each tier takes of a small suite."""

from __future__ import annotations

import subprocess

import pytest
import tiers

pytest_plugins = ["pytester"]

SUITE = """
    import pytest

    def test_plain(): pass

    @pytest.mark.processes
    def test_expensive(): pass

    @pytest.mark.nvcc
    def test_machine_code(): pass

    @pytest.mark.parametrize("n", range(40))
    @pytest.mark.sizes
    def test_many_expensive(n): pass

    @pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.core)])
    @pytest.mark.processes
    def test_representative(n): pass

    @pytest.mark.parametrize(("a", "b"), [(0, 1), (2, 3), (4, 5)])
    @pytest.mark.parametrize("c", "xyz")
    @pytest.mark.parametrize("d", "uv")
    def test_combined(a, b, c, d): pass
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """The tests of SUITE."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeconftest("pytest_plugins = ['tiers']")
    items, _ = pytester.inline_genitems(pytester.makepyfile(SUITE), "-p", "no:cacheprovider")
    assert len(items) == 1 + 1 + 1 + 40 + 2 + 18
    return items


def test_core_takes_what_is_cheap_the_representatives_and_each_value_of_combinations(suite):
    names = [item.name for item in suite if item in tiers.core_of(suite)]
    combined = [name for name in names if "combined" in name]
    assert [name for name in names if name not in combined] == ["test_plain", "test_representative[2]"]
    assert 3 <= len(combined) <= 5
    for value in ("0-1]", "2-3]", "4-5]", "-x-", "-y-", "-z-", "[u-", "[v-"):
        assert any(value in name for name in combined), value


def test_the_shares_of_ci_overlap_in_core_and_make_up_all_but_what_nvcc_compiles(suite):
    core = tiers.core_of(suite)
    shares = [set(tiers.chosen(suite, "ci", share)) for share in range(tiers.SHARES)]
    everything = set(tiers.chosen(suite, "all"))
    assert everything == set(suite)
    assert {item.name for item in everything.difference(*shares)} == {"test_machine_code"}
    for i, share in enumerate(shares):
        assert core < share
        assert all(share & other == core for other in shares[:i])


def test_the_commit_chooses_the_share(suite, pytester):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *arguments], cwd=pytester.path, check=True, capture_output=True, text=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    share = tiers.share_of(git("rev-parse", "HEAD").stdout.strip())
    result = pytester.runpytest_inprocess("--tier", "ci", "--collect-only", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(f"tier: ci, with share {share} of {tiers.SHARES}*")
    selected = len(tiers.chosen(suite, "ci", share))
    result.stdout.fnmatch_lines(f"*{selected}/{len(suite)} tests collected*")
    assert len({tiers.share_of(f"{commit:040x}") for commit in range(32)}) == tiers.SHARES


def test_outside_of_git_the_share_has_to_be_given(suite, pytester, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    result = pytester.runpytest_inprocess("--tier", "ci", "--collect-only")
    result.stderr.fnmatch_lines("*give --share*")
