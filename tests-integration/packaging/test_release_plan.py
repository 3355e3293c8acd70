"""What may be released, and what is refused with which words; on small repositories, nothing is built."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from release_plan import PARTS, increment, plan_release, read_status


def refusal(repository, package, wanted):
    with pytest.raises(ValueError, match="cannot be released") as caught:
        plan_release(repository.root, package, wanted)
    return str(caught.value).splitlines()[1:]


@pytest.fixture
def chain(repository):
    """Three packages, each needing the one before, and a fourth with only an extra."""
    repository.add("am-base")
    repository.add("am-middle", needs=["am-base>=0.1,<0.2"])
    repository.add("am-top", needs=["am-middle>=0.1,<0.2"])
    repository.add("am-aside", extra=["am-base>=0.1,<0.2", "am-aside"])
    return repository


def test_a_first_release_may_have_the_version_that_pyproject_says(chain):
    plan = plan_release(chain.root, "am-base", "0.1.0")
    assert (plan.old, plan.new, plan.tag) == ("0.1.0", "0.1.0", "am-base-v0.1.0")
    assert plan.entries == ("- It exists.",)
    assert (plan.siblings, plan.beside, plan.branch) == ((), (), "main")


def test_planning_changes_nothing(chain):
    before = chain.state()
    plan_release(chain.root, "am-base", "0.1.0")
    refusal(chain, "am-top", "0.0.9")
    read_status(chain.root)
    assert chain.state() == before


def test_a_plan_names_the_tagged_siblings_in_range_and_the_newest_of_them_that_come_along(chain):
    for tag in ("am-base-v0.1.0", "am-base-v0.1.10", "am-base-v0.1.9", "am-base-v0.2.0", "am-middle-v0.1.0"):
        chain.git("tag", tag)
    plan = plan_release(chain.root, "am-top", "0.1.0")
    assert [s.requirement for s in plan.siblings] == ["am-middle<0.2,>=0.1"]
    assert plan.siblings[0].satisfied_by == ("0.1.0",)
    assert plan.beside == ("am-middle-v0.1.0", "am-base-v0.1.10")
    assert "am-middle<0.2,>=0.1 is satisfied by 0.1.0" in str(plan)


def test_a_sibling_brings_what_it_needed_when_it_was_tagged(chain):
    chain.git("tag", "am-base-v0.1.0")
    chain.git("tag", "am-middle-v0.1.0")
    chain.add("am-middle", needs=[])
    assert plan_release(chain.root, "am-top", "0.1.0").beside == ("am-middle-v0.1.0", "am-base-v0.1.0")


def test_out_of_order_it_says_what_to_release_first(chain):
    (line,) = refusal(chain, "am-top", "0.1.0")
    assert line == (
        "- am-top needs am-middle<0.2,>=0.1, and no tagged release is in that range (tags: none); "
        "release am-base and then am-middle first"
    )
    chain.git("tag", "am-base-v0.1.0")
    (line,) = refusal(chain, "am-top", "0.1.0")
    assert line.endswith("release am-middle first")


def test_tags_outside_of_a_range_do_not_satisfy_it_and_are_named(chain):
    chain.git("tag", "am-base-v0.2.0")
    chain.git("tag", "am-base-v0.0.9")
    (line,) = refusal(chain, "am-middle", "0.1.0")
    assert "(tags: am-base-v0.0.9, am-base-v0.2.0); release am-base first" in line


def test_ranges_of_extras_must_be_satisfied_but_do_not_come_along(chain):
    (line,) = refusal(chain, "am-aside", "0.1.0")
    assert line.startswith("- am-aside needs am-base<0.2,>=0.1")
    chain.git("tag", "am-base-v0.1.0")
    plan = plan_release(chain.root, "am-aside", "0.1.0")
    assert (plan.siblings[0].satisfied_by, plan.beside) == (("0.1.0",), ())


def test_a_tagged_sibling_whose_own_siblings_lost_their_tags_is_refused(chain):
    chain.git("tag", "am-middle-v0.1.0")
    (line,) = refusal(chain, "am-top", "0.1.0")
    assert line.startswith("- am-middle-v0.1.0 needs am-base<0.2,>=0.1")


def test_a_version_that_leaves_the_range_of_another_package_of_the_checkout_is_refused(chain):
    chain.add("am-base", changelog="## 0.2.0 (unreleased)\n\n- New.\n")
    assert refusal(chain, "am-base", "0.2.0") == [
        f"- {other} in this checkout needs am-base<0.2,>=0.1, which leaves 0.2.0 out: widen that range first"
        for other in ("am-aside", "am-middle")
    ]


@pytest.mark.parametrize("dirt", ["new.txt", "packages/am-base/README.md"])
def test_a_dirty_tree_is_refused_by_name(chain, dirt):
    chain.write(dirt, "changed")
    assert refusal(chain, "am-base", "0.1.0") == [f"- the tree has changes that are not committed: {dirt}"]


def test_an_unknown_package_is_refused_with_those_that_there_are(chain):
    (line,) = refusal(chain, "am-bse", "0.1.0")
    assert line == "- there is no package 'am-bse'; the packages are am-aside, am-base, am-middle, am-top"


def test_an_existing_tag_is_refused(chain):
    chain.git("tag", "am-base-v0.1.0")
    assert refusal(chain, "am-base", "0.1.0") == ["- the tag am-base-v0.1.0 exists"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("next", "'next' is not a version of PEP 440, nor one of major, minor, patch"),
        ("0.1.x", "'0.1.x' is not a version of PEP 440"),
        ("v0.2.0", "'v0.2.0' is not how an index writes a version: write 0.2.0"),
        ("0.2.0-rc1", "'0.2.0-rc1' is not how an index writes a version: write 0.2.0rc1"),
        ("0.2.0+cpu", "'0.2.0+cpu' is not how an index writes a version: write 0.2.0"),
        ("0.1.4", "0.1.4 does not increase: am-base-v0.1.5 is tagged"),
        ("0.1.5.0", "0.1.5.0 does not increase: am-base-v0.1.5 is tagged"),
        ("0.1.5rc1", "0.1.5rc1 does not increase: am-base-v0.1.5 is tagged"),
    ],
)
def test_versions_that_are_none_or_do_not_increase_are_refused(repository, wanted, words):
    repository.add("am-base", version="0.1.5", changelog="## Unreleased\n\n- New.\n")
    repository.git("tag", "am-base-v0.1.5")
    assert refusal(repository, "am-base", wanted)[0].startswith(f"- {words}")


def test_versions_are_compared_as_numbers_and_tags_of_other_packages_do_not_count(repository):
    repository.add("am-base", changelog="## Unreleased\n\n- New.\n")
    for tag in ("am-base-v0.9.0", "am-base-v0.10.0", "am-base-vnext", "am-base-extra-v3.0.0", "v7.0.0"):
        repository.git("tag", tag)
    assert plan_release(repository.root, "am-base", "patch").new == "0.10.1"
    assert refusal(repository, "am-base", "0.9.1") == ["- 0.9.1 does not increase: am-base-v0.10.0 is tagged"]


def test_a_version_that_pyproject_already_announces_may_be_released_but_none_below_it(repository):
    repository.add("am-base", version="0.2.0", changelog="## Unreleased\n\n- New.\n")
    repository.git("tag", "am-base-v0.1.0")
    assert plan_release(repository.root, "am-base", "minor").new == "0.2.0"
    assert refusal(repository, "am-base", "patch") == [
        "- 0.1.1 does not increase: packages/am-base/pyproject.toml says 0.2.0"
    ]


@pytest.mark.parametrize(("part", "new"), [("major", "1.0.0"), ("minor", "0.2.0"), ("patch", "0.1.3")])
@pytest.mark.parametrize("last_tag", [True, False])
def test_steps_are_counted_from_the_last_tag_or_from_pyproject(repository, part, new, last_tag):
    repository.add("am-base", version="0.1.0" if last_tag else "0.1.2", changelog="## Unreleased\n\n- New.\n")
    if last_tag:
        repository.git("tag", "am-base-v0.1.2")
    assert plan_release(repository.root, "am-base", part).new == new


@pytest.mark.parametrize(
    ("changelog", "words"),
    [
        ("", "has no heading: write `## 0.1.0 (unreleased)`"),
        ("## 0.1.0 (unreleased)\n", "has no entries under `## 0.1.0 (unreleased)`"),
        ("## Unreleased\n\nSoon.\n\n## 0.0.9 (2026-01-01)\n\n- Old.\n", "has no entries under `## Unreleased`"),
        ("## 0.0.9 (2026-01-01)\n\n- Old.\n", "has no entries for 0.1.0: its first heading is `## 0.0.9 (2026-01-01)`"),
        ("## Thoughts\n\n- None.\n", "has no entries for 0.1.0: its first heading is `## Thoughts`"),
    ],
)
def test_a_changelog_without_entries_for_the_version_is_refused(repository, changelog, words):
    repository.add("am-base", changelog=changelog)
    (line,) = refusal(repository, "am-base", "0.1.0")
    assert line.startswith(f"- packages/am-base/CHANGELOG.md {words}")


def test_entries_are_those_of_the_first_heading_with_their_further_lines(repository):
    repository.add("am-base", changelog="## 0.1.0\n\n- One\n  and more.\n- Two.\n\n## 0.0.9\n\n- Old.\n")
    assert plan_release(repository.root, "am-base", "0.1.0").entries == ("- One\n  and more.", "- Two.")


def test_all_reasons_come_at_once(chain):
    chain.git("tag", "am-middle-v0.3.0")
    chain.write("packages/am-middle/CHANGELOG.md", "# Changelog\n\n## 0.0.1\n\n- Old.\n")
    lines = refusal(chain, "am-middle", "0.0.2")
    for words in (
        "not committed",
        "v0.3.0 is tagged",
        "pyproject.toml says 0.1.0",
        "no entries",
        "leaves",
        "needs am-base",
    ):
        assert any(words in line for line in lines), words


versions = st.builds(
    lambda numbers, rest: Version(".".join(map(str, numbers)) + rest),
    st.lists(st.integers(0, 30), min_size=1, max_size=4),
    st.sampled_from(["", "a1", "b2", "rc3", ".post1", ".dev4", "rc1.post2", ".post1.dev2", "a1.dev1"]),
)


@settings(deadline=None)
@given(versions, st.sampled_from(PARTS))
def test_a_step_increases_and_ends_in_zeros(version, part):
    new = increment(version, part)
    assert new > version
    assert not new.is_prerelease
    assert new.release[PARTS.index(part) + 1 :] == (0,) * (2 - PARTS.index(part))


@settings(deadline=None)
@given(versions)
def test_a_larger_step_goes_at_least_as_far(version):
    assert increment(version, "major") >= increment(version, "minor") >= increment(version, "patch")


@settings(deadline=None)
@given(versions, st.sampled_from(PARTS))
def test_a_step_is_the_smallest_of_its_size(version, part):
    new = increment(version, part)
    before = list(new.release)
    place = PARTS.index(part)
    before[place] -= 1
    assert before[place] < 0 or Version(".".join(map(str, before))) <= version


def test_the_status_counts_commits_to_the_folder_of_a_package_since_its_highest_tag(chain):
    for tag in ("am-base-v0.1.0", "am-middle-v0.1.0", "am-middle-v0.0.1"):
        chain.git("tag", tag)
    chain.write("packages/am-base/README.md", "changed")
    chain.commit("Change base")
    chain.write("elsewhere.txt", "changed")
    chain.commit("Change something else")
    rows = {row.package: (row.tag, row.commits, row.needs_release) for row in read_status(chain.root)}
    assert rows == {
        "am-base": ("am-base-v0.1.0", 1, True),
        "am-middle": ("am-middle-v0.1.0", 0, False),
        "am-top": (None, 1, True),
        "am-aside": (None, 1, True),
    }
