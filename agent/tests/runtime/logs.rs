//! Output becomes rotated files and never stops the container.

use foreshore_agent::runtime::Runtime as _;
use serde_json::json;

use crate::bed::{Bed, exit_of, run, wait_for};

#[tokio::test]
async fn logs_are_rotated_and_lines_stay_whole() {
    let bed = Bed::new();
    let line = "for i in $(seq 1 600); do echo line $i of stdout; echo line $i of stderr >&2; done; printf end";
    let (_, _) = run(
        &bed,
        &bed.shell(line, json!({"logging": {"max_size": "8k", "max_file": 3}})),
    )
    .await;
    let logs = bed.state_dir().join("logs/shop");
    let mut names: Vec<String> = std::fs::read_dir(&logs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["web.log", "web.log.1", "web.log.2"]);
    let mut all = String::new();
    for name in names.iter().rev() {
        let text = std::fs::read_to_string(logs.join(name)).unwrap();
        assert!(text.len() <= 8192, "{name} has {} bytes", text.len());
        all.push_str(&text);
    }
    // Between the two nothing is in order: one pipe may be read to its end before the other, and the oldest entries go.
    let mut kept = 0;
    for stream in ["stdout", "stderr"] {
        let mut text = String::new();
        for line in all.lines() {
            // What stands without a newline for half a second is logged as a part; its end may follow much later.
            if let Some((_, whole)) = line.split_once(&format!(" {stream} F ")) {
                text.push_str(whole);
                text.push('\n');
            } else if let Some((_, part)) = line.split_once(&format!(" {stream} P ")) {
                text.push_str(part);
            }
        }
        let mut expected: Vec<String> =
            (1..=600).map(|i| format!("line {i} of {stream}")).collect();
        expected.extend((stream == "stdout").then(|| "end".to_owned()));
        let seen: Vec<&str> = text.lines().collect();
        kept += seen.len();
        assert_eq!(
            seen,
            &expected[expected.len() - seen.len()..],
            "the newest lines of {stream}, in order, whole"
        );
    }
    assert!(kept > 200, "{all}");
}

#[tokio::test]
async fn long_lines_prompts_and_floods_are_kept_or_dropped_but_never_block() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let spec = bed.shell("head -c 10000 /dev/zero | tr '\\0' x 2>/dev/null || yes x | head -c 9999; printf 'name? '; sleep 1000", json!({}));
    runtime.start(&spec).await.unwrap();
    // Without a newline, and while the container lives.
    wait_for("the prompt is logged", || async {
        bed.log("web").ends_with("name? ")
    })
    .await;
    runtime.remove(&spec.id).await.unwrap();

    // The log directory cannot be written: the container must not notice.
    std::fs::remove_dir_all(bed.state_dir().join("logs")).unwrap();
    std::fs::write(bed.state_dir().join("logs"), "in the way").unwrap();
    let spec = bed.shell("yes | head -c 3000000; exit 5", json!({}));
    std::fs::remove_file(bed.state_dir().join("logs")).unwrap();
    std::fs::create_dir(bed.state_dir().join("logs")).unwrap();
    std::fs::write(bed.state_dir().join("logs/shop"), "in the way").unwrap();
    runtime.start(&spec).await.unwrap();
    assert_eq!(exit_of(&runtime, &spec.id).await.code, 5);
}

#[tokio::test]
async fn a_full_disk_drops_logs_and_stops_nobody() {
    let bed = Bed::new();
    let logs = bed.state_dir().join("logs/shop");
    std::fs::create_dir_all(&logs).unwrap();
    // A log that is the device which is always full.
    std::os::unix::fs::symlink("/dev/full", logs.join("web.log")).unwrap();
    let spec = bed.shell("yes | head -c 1000000; exit 6", json!({}));
    let runtime = bed.runtime();
    runtime.start(&spec).await.unwrap();
    assert_eq!(exit_of(&runtime, &spec.id).await.code, 6);
    runtime.remove(&spec.id).await.unwrap();
    // Links are not followed, so a real full file system too.
    std::fs::remove_file(logs.join("web.log")).unwrap();
    nix::mount::mount(
        Some("tmpfs"),
        &logs,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=16k"),
    )
    .unwrap();
    let outcome = async {
        let spec = bed.shell("yes | head -c 1000000; exit 6", json!({}));
        runtime
            .start(&spec)
            .await
            .map_err(|error| format!("{error:?}"))?;
        let code = exit_of(&runtime, &spec.id).await.code;
        runtime
            .remove(&spec.id)
            .await
            .map_err(|error| format!("{error:?}"))?;
        Ok::<_, String>(code)
    }
    .await;
    nix::mount::umount2(&logs, nix::mount::MntFlags::MNT_DETACH).unwrap();
    assert_eq!(outcome, Ok(6));
}
