//! Uploads on a directory and a store of their own.

use super::*;
use futures_util::stream;

const LIMITS: Limits = Limits {
    open: 3,
    blob_bytes: 100,
    expires_ms: 1000,
};

struct Place {
    dir: tempfile::TempDir,
    store: Store,
    uploads: Uploads,
}

async fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let (store, _writer) = Store::open(&dir.path().join("hub.db")).unwrap();
    let uploads = reopen(&dir, &store).await;
    Place {
        dir,
        store,
        uploads,
    }
}

async fn reopen(dir: &tempfile::TempDir, store: &Store) -> Uploads {
    Uploads::open(dir.path().join("pushes"), store.clone(), LIMITS)
        .await
        .unwrap()
}

const NOW: UnixMs = UnixMs(10_000);

fn claim(first: Option<u64>, length: Option<u64>) -> Claim {
    Claim { first, length }
}

#[tokio::test]
async fn an_upload_goes_on_after_a_restart_from_its_last_byte() {
    let place = place().await;
    let held = place.uploads.begin("demo", NOW).await.unwrap();
    let id = held.id().to_owned();
    let held = place
        .uploads
        .append(held, Body::from("hello "), claim(Some(0), Some(6)), NOW)
        .await
        .unwrap();
    drop(held);
    let orphan = place.dir.path().join("pushes").join("0".repeat(32));
    fs::write(&orphan, "no row").unwrap();

    let uploads = reopen(&place.dir, &place.store).await;
    assert!(!orphan.exists());
    assert!(matches!(
        uploads.hold("other", &id).await,
        Err(UploadError::Unknown)
    ));
    let held = uploads.hold("demo", &id).await.unwrap();
    assert_eq!(held.size(), 6);
    let refused = uploads
        .append(held, Body::from("x"), claim(Some(5), None), NOW)
        .await;
    assert!(matches!(refused, Err(UploadError::OutOfOrder(6))));
    let held = uploads.hold("demo", &id).await.unwrap();
    let held = uploads
        .append(held, Body::from("world"), Claim::default(), NOW)
        .await
        .unwrap();
    let target = place.dir.path().join("blob");
    uploads
        .finish(held, Digest::of(b"hello world"), target.clone(), NOW)
        .await
        .unwrap();
    assert_eq!(fs::read(target).unwrap(), b"hello world");
    assert!(matches!(
        uploads.hold("demo", &id).await,
        Err(UploadError::Unknown)
    ));
}

#[tokio::test]
async fn lengths_are_held_to_and_wrong_digests_end_the_upload() {
    let Place { uploads, dir, .. } = place().await;
    for (text, told, came) in [("four", 3, 4), ("four", 5, 4)] {
        let held = uploads.begin("demo", NOW).await.unwrap();
        let id = held.id().to_owned();
        let refused = uploads
            .append(held, Body::from(text), claim(None, Some(told)), NOW)
            .await;
        match refused {
            Err(UploadError::Length { told: t, came: c }) => assert_eq!((t, c), (told, came)),
            other => panic!("{other:?}"),
        }
        let held = uploads.hold("demo", &id).await.unwrap();
        uploads.cancel(held).await.unwrap();
    }
    for (length, size) in [(Some(u64::MAX), 0), (None, 200)] {
        let held = uploads.begin("demo", NOW).await.unwrap();
        let id = held.id().to_owned();
        let refused = uploads
            .append(held, Body::from(vec![0; size]), claim(None, length), NOW)
            .await;
        assert!(
            matches!(refused, Err(UploadError::TooLarge(100))),
            "{refused:?}"
        );
        uploads
            .cancel(uploads.hold("demo", &id).await.unwrap())
            .await
            .unwrap();
    }
    let held = uploads.begin("demo", NOW).await.unwrap();
    let id = held.id().to_owned();
    let refused = uploads
        .finish(held, Digest::of(b"x"), dir.path().join("blob"), NOW)
        .await;
    assert!(matches!(refused, Err(UploadError::Digest(_))));
    assert!(matches!(
        uploads.hold("demo", &id).await,
        Err(UploadError::Unknown)
    ));
    assert!(!dir.path().join("blob").exists());
    assert_eq!(fs::read_dir(dir.path().join("pushes")).unwrap().count(), 0);
}

#[tokio::test]
async fn uploads_are_bounded_in_number_and_age() {
    let Place { uploads, dir, .. } = place().await;
    for _ in 0..LIMITS.open {
        uploads.begin("demo", NOW).await.unwrap();
    }
    for _ in 0..10 {
        let refused = uploads.begin("demo", NOW).await;
        assert!(matches!(refused, Err(UploadError::TooMany(3))));
    }
    assert_eq!(fs::read_dir(dir.path().join("pushes")).unwrap().count(), 3);
    let later = UnixMs(NOW.0 + IDLE_MS);
    assert!(uploads.begin("demo", later).await.is_err());
    drop(uploads.begin("demo", UnixMs(later.0 + 1)).await.unwrap());
    assert_eq!(fs::read_dir(dir.path().join("pushes")).unwrap().count(), 1);
    for _ in 1..LIMITS.open {
        uploads.begin("demo", NOW).await.unwrap();
    }
    assert_eq!(uploads.expire(UnixMs(NOW.0 + 1000)).await.unwrap(), 0);
    assert_eq!(uploads.expire(UnixMs(NOW.0 + 1001)).await.unwrap(), 2);
    assert_eq!(uploads.expire(UnixMs(later.0 + 1002)).await.unwrap(), 1);
    assert_eq!(fs::read_dir(dir.path().join("pushes")).unwrap().count(), 0);
    uploads.begin("demo", NOW).await.unwrap();
}

#[tokio::test]
async fn who_sends_nothing_or_a_trickle_is_cut_off_and_keeps_what_came() {
    let mut place = place().await;
    let inner = Arc::get_mut(&mut place.uploads.inner).unwrap();
    inner.patience = Patience {
        idle: Duration::from_secs(1),
        base: Duration::from_secs(3),
        pace: 1000,
    };
    let uploads = place.uploads;
    let silent =
        stream::once(async { Ok::<_, io::Error>(Bytes::from("abc")) }).chain(stream::pending());
    let trickle = stream::unfold((), |()| async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        Some((Ok::<_, io::Error>(Bytes::from("x")), ()))
    });
    for body in [Body::from_stream(silent), Body::from_stream(trickle)] {
        let held = uploads.begin("demo", NOW).await.unwrap();
        let id = held.id().to_owned();
        match uploads.append(held, body, Claim::default(), NOW).await {
            Err(UploadError::Slow(came)) => {
                assert!((3..20).contains(&came), "{came}");
                assert_eq!(uploads.hold("demo", &id).await.unwrap().size(), came);
            }
            other => panic!("{other:?}"),
        }
    }
}
