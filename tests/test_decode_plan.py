"""The decode plan on made-up packets: every stretch begins at a key frame and holds what the wanted frames need."""

import numpy as np
import pytest

from kinoray.video.plan import PacketTable, Run


def table(
    pts: list[int | None], keys: list[int], *, hidden: list[int] | None = None, stored: bool = True
) -> PacketTable:
    keyframe, shown = np.zeros(len(pts), bool), np.ones(len(pts), bool)
    keyframe[keys] = True
    shown[hidden or []] = False
    return PacketTable(pts, keyframe, shown, times_stored=stored)


def runs(plan: list[Run]) -> list[tuple[int, int]]:
    return [(run.begin, run.end) for run in plan]


CLOSED = table([0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10], keys=[0, 4, 8])
OPEN = table([0, 3, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10], keys=[0, 4, 8])  # frames shown before their group's key frame


def test_frames_are_numbered_in_the_order_they_are_shown() -> None:
    assert CLOSED.num_frames == 12
    assert CLOSED.frame_of.tolist() == [0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10]
    spread = table([10, 310, 120, 290], keys=[0])  # any times, any gaps
    assert spread.frame_of.tolist() == [0, 3, 1, 2]
    assert spread.index_of_time() == {10: 0, 120: 1, 290: 2, 310: 3}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0], [(0, 1)]),
        ([2], [(0, 4)]),
        ([3], [(0, 2)]),
        ([5], [(4, 7)]),
        ([1, 9], [(0, 3), (8, 11)]),
        ([3, 4], [(0, 2), (4, 5)]),
        (list(range(12)), [(0, 4), (4, 8), (8, 12)]),
    ],
)
def test_closed_groups_are_entered_at_their_key_frames(wanted: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(CLOSED.runs_for(np.array(wanted))) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        pytest.param([7], [(4, 5)], id="a key frame needs nothing before it"),
        pytest.param([4], [(0, 6)], id="a leading frame needs the group before"),
        pytest.param([8], [(4, 10)], id="but not the one before that"),
        pytest.param([3, 5], [(0, 7)], id="stretches that touch become one"),
        pytest.param([4, 8], [(0, 10)], id="leading frames of two groups"),
        pytest.param([0, 11], [(0, 1), (8, 9)], id="none leading"),
    ],
)
def test_open_groups_are_entered_a_group_earlier(wanted: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(OPEN.runs_for(np.array(wanted))) == expected


def test_a_plain_plan_is_one_stretch_to_the_last_wanted_packet() -> None:
    assert runs(CLOSED.runs_in_order(np.array([2, 5]))) == [(0, 7)]
    assert CLOSED.wanted_packets(np.array([2, 5])).nonzero()[0].tolist() == [3, 6]


def test_packets_before_the_first_key_frame_carry_no_frame() -> None:
    cut = table([7, 5, 6, 8, 11, 9, 10], keys=[3])
    assert cut.frame_of.tolist() == [-1, -1, -1, 0, 3, 1, 2]
    assert runs(cut.runs_for(np.array([0]))) == [(3, 4)]
    assert cut.index_of_time()[7] == -1


def test_hidden_packets_carry_no_frame_but_are_decoded() -> None:
    edited = table([-2, -1, 0, 1], keys=[0], hidden=[0, 1])
    assert edited.frame_of.tolist() == [-1, -1, 0, 1]
    assert runs(edited.runs_for(np.array([1]))) == [(0, 4)]


def test_without_key_frames_everything_is_one_group() -> None:
    assert runs(table([0, 1, 2], keys=[]).runs_for(np.array([1]))) == [(0, 2)]


@pytest.mark.parametrize(
    ("times", "stored", "timed"),
    [
        pytest.param([0, 3, 1, 2], True, True, id="unique"),
        pytest.param([0, 3, 1, 2], False, False, id="container without times"),
        pytest.param([0, None, 1, 2], True, False, id="one is missing"),
        pytest.param([0, 1, 1, 2], True, False, id="one comes twice"),
        pytest.param([*range(100, 200), *range(100)], True, False, id="second half first"),
    ],
)
def test_times_are_trusted_only_where_they_tell_frames_apart(
    times: list[int | None], stored: bool, timed: bool
) -> None:
    assert table(times, keys=[0], stored=stored).timed is timed


def test_plans_suffice_for_random_streams() -> None:
    """Whatever the groups look like: a slow walk over each wanted frame's needs finds them all in the plan."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        pts, keys, time = [], [], 0
        for _ in range(int(rng.integers(1, 7))):
            size, num_leading = int(rng.integers(1, 8)), int(rng.integers(0, 3)) if time else 0
            num_leading = min(num_leading, size - 1)
            keys.append(len(pts))
            pts += [time + num_leading, *range(time, time + num_leading)]
            rest = list(range(time + num_leading + 1, time + size))
            rng.shuffle(rest)
            pts += rest
            time += size
        packets = table(pts, keys)
        wanted = np.unique(rng.integers(0, len(pts), int(rng.integers(1, 6))))
        plan = packets.runs_for(wanted)
        sent = [place for run in plan for place in range(run.begin, run.end)]
        assert len(sent) == len(set(sent))
        assert sent == sorted(sent)
        assert all(run.begin in keys for run in plan)
        for place in np.flatnonzero(packets.wanted_packets(wanted)).tolist():
            group = max(key for key in keys if key <= place)
            run = next(run for run in plan if run.begin <= place < run.end)
            assert run.begin <= group
            if pts[place] < pts[group]:  # leading: the whole group before is in the same stretch
                assert run.begin <= max(key for key in keys if key < group)
