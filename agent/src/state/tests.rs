use super::*;
use foreshore_protocol::message::{Event, EventKind};
use proptest::prelude::*;

fn version(epoch: u64, generation: u64) -> Version {
    Version::from_numbers(epoch, generation).unwrap()
}

fn head(version: Version) -> Head {
    Head {
        version,
        apps: Vec::new(),
    }
}

fn event(message: &str) -> Event {
    Event {
        seq: 0,
        boot: 1,
        unix_ms: 0,
        app: None,
        service: None,
        kind: EventKind::Started,
        message: message.to_owned(),
    }
}

#[test]
fn versions_never_go_back_even_when_the_head_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (mut state, loaded) = State::open(dir.path(), 100).unwrap();
    assert!(loaded.head.is_none());
    state.accept(&head(version(1, 5)), None).unwrap();
    assert!(
        state
            .accept(&head(version(1, 5)), Some(version(1, 5)))
            .is_err()
    );
    assert!(
        state
            .accept(&head(version(1, 4)), Some(version(1, 5)))
            .is_err()
    );
    drop(state);

    std::fs::write(dir.path().join("head"), b"FS garbage").unwrap();
    let (mut state, loaded) = State::open(dir.path(), 100).unwrap();
    assert!(loaded.head.is_none());
    assert_eq!(loaded.damage.len(), 1, "{:?}", loaded.damage);
    assert!(state.accept(&head(version(1, 4)), None).is_err());
    state.accept(&head(version(1, 5)), None).unwrap();
    state
        .accept(&head(version(2, 1)), Some(version(1, 5)))
        .unwrap();
    drop(state);
    let (_, loaded) = State::open(dir.path(), 100).unwrap();
    assert_eq!(loaded.head.unwrap().version, version(2, 1));
}

#[test]
fn one_agent_has_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (state, _) = State::open(dir.path(), 1).unwrap();
    assert!(matches!(
        State::open(dir.path(), 1),
        Err(OpenError::InUse(_))
    ));
    drop(state);
    State::open(dir.path(), 1).unwrap();
}

#[test]
fn counters_grow_and_begin_at_the_clock_where_none_are_left() {
    let dir = tempfile::tempdir().unwrap();
    let (mut state, _) = State::open(dir.path(), 1000).unwrap();
    assert_eq!(state.boot(), 1001);
    let first = state.next_session().0;
    drop(state);
    let (mut state, _) = State::open(dir.path(), 5).unwrap();
    assert_eq!(state.boot(), 1002);
    assert!(state.next_session().0 > first);
}

#[test]
fn events_survive_a_restart_and_leave_when_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (_state, mut loaded) = State::open(dir.path(), 1).unwrap();
    for message in ["a", "b", "c"] {
        loaded.outbox.push(event(message)).unwrap();
    }
    drop((_state, loaded));
    let (_state, mut loaded) = State::open(dir.path(), 1).unwrap();
    assert_eq!(
        loaded
            .outbox
            .events()
            .map(|event| event.seq)
            .collect::<Vec<_>>(),
        [1, 2, 3]
    );
    loaded.outbox.acknowledge(2).unwrap();
    drop((_state, loaded));
    let (_state, mut loaded) = State::open(dir.path(), 1).unwrap();
    assert_eq!(
        loaded
            .outbox
            .events()
            .map(|event| &*event.message)
            .collect::<Vec<_>>(),
        ["c"]
    );
    loaded.outbox.acknowledge(3).unwrap();
    drop((_state, loaded));
    // Numbers go on where they were, also through an empty file.
    let (_state, mut loaded) = State::open(dir.path(), 1).unwrap();
    loaded.outbox.push(event("d")).unwrap();
    assert_eq!(loaded.outbox.newest(), 4);
}

#[test]
fn too_many_events_drop_the_oldest_and_the_file_stays_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let (_state, mut loaded) = State::open(dir.path(), 1).unwrap();
    for _ in 0..5000 {
        loaded.outbox.push(event(&"x".repeat(500))).unwrap();
    }
    assert_eq!(loaded.outbox.events().count(), 1000);
    assert_eq!(loaded.outbox.newest(), 5000);
    assert!(std::fs::metadata(dir.path().join("events")).unwrap().len() <= (1 << 20) + 1024);
}

#[test]
fn an_acknowledgement_from_before_the_numbers_were_lost_moves_them_up() {
    let dir = tempfile::tempdir().unwrap();
    let (_state, mut loaded) = State::open(dir.path(), 1).unwrap();
    loaded.outbox.push(event("new")).unwrap();
    loaded.outbox.acknowledge(70).unwrap();
    assert_eq!(
        loaded
            .outbox
            .events()
            .map(|event| event.seq)
            .collect::<Vec<_>>(),
        [71]
    );
}

#[test]
fn releases_with_wrong_bytes_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let (state, _) = State::open(dir.path(), 1).unwrap();
    state.store_release(&Digest::of(b"x"), b"not x").unwrap();
    drop(state);
    let (_, loaded) = State::open(dir.path(), 1).unwrap();
    assert!(loaded.releases.is_empty());
    assert_eq!(loaded.damage.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a medium makes of any file, the agent starts, and says so unless the file reads the same.
    #[test]
    fn any_damage_is_survived(
        name in prop::sample::select(vec!["head", "history", "counters", "events"]),
        cut in 0_usize..200,
        flip in any::<prop::sample::Index>(),
        bit in 0_u8..8,
        zero: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut state, mut loaded) = State::open(dir.path(), 1).unwrap();
        state.accept(&head(version(1, 1)), None).unwrap();
        state.remember(&History { instance_floor: 7, ..History::default() }).unwrap();
        loaded.outbox.push(event("something")).unwrap();
        drop((state, loaded));

        let path = dir.path().join(name);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad.truncate(good.len().saturating_sub(cut));
        if !bad.is_empty() {
            let at = flip.index(bad.len());
            bad[at] ^= 1 << bit;
        }
        if zero {
            bad.fill(0);
        }
        std::fs::write(&path, &bad).unwrap();
        let (mut state, loaded) = State::open(dir.path(), 1).unwrap();
        // The event file heals its own tail silently; the others are whole or set aside.
        if name != "events" {
            prop_assert_eq!(loaded.damage.is_empty(), bad == good);
        }
        state.remember(&History::default()).unwrap();
    }
}

#[test]
fn connection_numbers_grow_over_restarts_and_cost_a_write_only_now_and_then() {
    let dir = tempfile::tempdir().unwrap();
    let mut newest = 0;
    for _ in 0..3 {
        let (mut state, _) = State::open(dir.path(), 1).unwrap();
        let before = std::fs::metadata(dir.path().join("counters"))
            .unwrap()
            .modified()
            .unwrap();
        for _ in 0..60 {
            let (session, stored) = state.next_session();
            stored.unwrap();
            assert!(session > newest);
            newest = session;
        }
        let after = std::fs::metadata(dir.path().join("counters"))
            .unwrap()
            .modified()
            .unwrap();
        assert_eq!(before, after, "within one block nothing is written");
        for _ in 0..10 {
            newest = state.next_session().0;
        }
    }
}

#[test]
fn an_acknowledgement_of_everything_for_ever_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (_state, mut loaded) = State::open(dir.path(), 1).unwrap();
    loaded.outbox.push(event("a")).unwrap();
    loaded.outbox.acknowledge(u64::MAX).unwrap();
    loaded.outbox.push(event("b")).unwrap();
    let seqs: Vec<u64> = loaded.outbox.events().map(|event| event.seq).collect();
    assert_eq!(seqs.len(), 2);
    assert!(seqs[0] < seqs[1]);
}

#[test]
fn what_could_not_be_read_back_does_not_replace_what_can() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("history");
    write_atomically(&path, b"good").unwrap();
    let error = write_atomically(&path, &vec![0; (16 << 20) + 1]).unwrap_err();
    assert!(!error.is_unwritable(), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), b"good");
}
