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
        budgets: Vec::new(),
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
        name in prop::sample::select(vec!["head", "history", "counters", "events", "secrets.box", "secrets.key"]),
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
        let sealed = SealedSecrets { sealed: vec![7; 90] };
        state.store_secrets(&sealed).unwrap();
        let key = loaded.secrets_key.as_ref().unwrap().public();
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
        prop_assert_eq!(loaded.secrets.as_ref() == Some(&sealed), name != "secrets.box" || bad == good);
        // Without its key a device makes another, and never has a wrong one.
        let same = loaded.secrets_key.as_ref().unwrap().public() == key;
        prop_assert_eq!(same, name != "secrets.key" || bad == good);
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

/// What a medium may make of a file whose old content was replaced by a new one when the power went.
fn damages(old: &[u8], new: &[u8]) -> Vec<Vec<u8>> {
    let mut damages = Vec::new();
    for whole in [old, new] {
        for at in 0..whole.len() {
            damages.push(whole[..at].to_vec());
            // A length that was stored before the content: the rest reads as zeros.
            let mut zeroed = whole.to_vec();
            zeroed[at..].fill(0);
            damages.push(zeroed);
            for bit in 0..8 {
                let mut flipped = whole.to_vec();
                flipped[at] ^= 1 << bit;
                damages.push(flipped);
            }
        }
        damages.push(vec![0; 4096]);
        damages.push([whole, &[0]].concat());
    }
    for at in 1..old.len().min(new.len()) {
        damages.push([&new[..at], &old[at..]].concat());
        damages.push([&old[..at], &new[at..]].concat());
    }
    damages
}

/// Memory, where there is some: thousands of files are written and flushed.
fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// Every damage to a framed file reads as old, as new, or as none with word of it; never as anything else.
fn read_after_every_damage<T: Framed + PartialEq + std::fmt::Debug>(old: &T, new: &T) {
    let dir = fast_dir();
    let path = dir.path().join("file");
    let (old_bytes, new_bytes) = (file::encode(old), file::encode(new));
    for bytes in damages(&old_bytes, &new_bytes) {
        std::fs::write(&path, &bytes).unwrap();
        let mut damage = Damage::default();
        match read_framed::<T>(&path, &mut damage).unwrap() {
            Some(value) => {
                assert!(value == *old || value == *new, "{value:?} from {bytes:?}");
                assert!(damage.0.is_empty());
            }
            None => {
                assert_eq!(damage.0.len(), 1);
                assert!(!path.exists(), "set aside");
            }
        }
    }
    let copies = std::fs::read_dir(dir.path()).unwrap().count();
    assert!(copies <= 5, "{copies} copies are kept");
}

#[test]
fn head_counters_and_history_are_old_new_or_set_aside_whatever_the_medium_does() {
    read_after_every_damage(&head(version(1, 1)), &head(version(1, 2)));
    let counters = |boot| Counters {
        boot,
        session: boot + 64,
        floor: Some(version(1, boot)),
    };
    read_after_every_damage(&counters(7), &counters(8));
    let history = |instance_floor| History {
        instance_floor,
        ..History::default()
    };
    read_after_every_damage(&history(7), &history(80_000));
}

#[test]
fn no_damage_to_a_release_manifest_makes_another_one() {
    let dir = fast_dir();
    let release = |image: &str| Release {
        schema: 1,
        app: "shop".parse().unwrap(),
        services: [(
            "web".parse().unwrap(),
            serde_json::from_value(serde_json::json!({"image": format!("h/a@sha256:{image}")}))
                .unwrap(),
        )]
        .into(),
        image_pull_secrets: Vec::new(),
    };
    let (old, new) = (
        release(&"1".repeat(64)).to_canonical_json(),
        release(&"2".repeat(64)).to_canonical_json(),
    );
    let digest = Digest::of(&old);
    let path = dir.path().join(format!("{}.json", digest.hex()));
    for bytes in damages(&old, &new) {
        std::fs::write(&path, &bytes).unwrap();
        let mut damage = Damage::default();
        let read = read_releases(dir.path(), &mut damage).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(read.len(), usize::from(bytes == old), "{text}");
        assert_eq!(damage.0.len(), usize::from(bytes != old));
    }
}

#[test]
fn events_after_any_damage_are_those_before_it() {
    let dir = fast_dir();
    let path = dir.path().join("events");
    let mut damage = Damage::default();
    let mut outbox = Outbox::open(&path, 1, &mut damage).unwrap();
    for message in ["one", "two"] {
        outbox.push(event(message)).unwrap();
    }
    let old = std::fs::read(&path).unwrap();
    outbox.push(event("three")).unwrap();
    let new = std::fs::read(&path).unwrap();
    let written: Vec<Event> = outbox.events().cloned().collect();
    for bytes in damages(&old, &new) {
        std::fs::write(&path, &bytes).unwrap();
        let mut damage = Damage::default();
        let mut outbox = Outbox::open(&path, 1_000, &mut damage).unwrap();
        let read: Vec<Event> = outbox.events().cloned().collect();
        // A record is lost with all that come after it, and none is made up.
        assert_eq!(read, written[..read.len()], "{bytes:?}");
        outbox.push(event("after")).unwrap();
        let mut again = Damage::default();
        let reread = Outbox::open(&path, 1_000, &mut again).unwrap();
        assert_eq!(reread.events().count(), read.len() + 1);
        assert!(again.0.is_empty());
    }
}

#[test]
fn an_append_that_is_torn_anywhere_loses_that_event_alone() {
    let dir = fast_dir();
    let path = dir.path().join("events");
    let mut damage = Damage::default();
    let mut outbox = Outbox::open(&path, 1, &mut damage).unwrap();
    outbox.push(event("kept")).unwrap();
    let old = std::fs::metadata(&path).unwrap().len();
    outbox.push(event("torn")).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for length in usize::try_from(old).unwrap()..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let outbox = Outbox::open(&path, 1, &mut damage).unwrap();
        let read: Vec<&str> = outbox.events().map(|event| &*event.message).collect();
        assert_eq!(read, ["kept"]);
        assert_eq!(outbox.newest(), 1);
    }
    assert!(damage.0.is_empty(), "{:?}", damage.0);
}
