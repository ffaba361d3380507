"""Nobody waits in silence."""

from apportion.workers.presence import Presence


def test_absence_is_told_once_each_time() -> None:
    told: list[str] = []
    presence = Presence(told.append, "nobody", seconds=0.0)
    for _ in range(3):
        presence.look()
    assert told == ["nobody"]
    presence.came()
    presence.look()
    presence.came()
    presence.went()
    presence.look()
    assert told == ["nobody"]
    presence.went()
    for _ in range(3):
        presence.look()
    assert told == ["nobody", "nobody"]


def test_short_absence_is_not_told() -> None:
    told: list[str] = []
    presence = Presence(told.append, "nobody", seconds=3600)
    presence.look()
    assert told == []
