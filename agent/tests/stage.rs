//! The child that fetches images does not outlive the agent that asked for it.

use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_child_that_begins_after_its_agent_is_gone_ends_before_it_asks_a_registry() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let registry = silent.local_addr().expect("it is bound");
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let config = dir.path().join("agent.toml");
    let token = dir.path().join("token");
    std::fs::write(&token, "token").expect("it is writable");
    let text = format!(
        "device = \"d1\"\n[hub]\nbroker = \"mqtt://127.0.0.1:1\"\nregistry = \"http://{registry}\"\njoin_token_file = {token:?}\n[paths]\nstate = {:?}\nrun = {:?}\n",
        dir.path().join("state"),
        dir.path().join("run"),
    );
    std::fs::write(&config, text).expect("it is writable");
    let (reader, writer) = std::io::pipe().expect("a pipe can be made");
    drop(reader);
    let began = Instant::now();
    let mut child = Command::new(env!("CARGO_BIN_EXE_foreshore-agent"))
        .args(["stage", "--config"])
        .arg(&config)
        .arg("--")
        .arg(format!("hub.internal/x@sha256:{}", "0".repeat(64)))
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn()
        .expect("the agent starts");
    let ended = child.wait().expect("it can be waited for");
    assert!(!ended.success(), "{ended}");
    assert!(began.elapsed() < Duration::from_secs(5));
    silent.set_nonblocking(true).expect("it is a socket");
    let asked = silent.accept().map(|(_, from)| from);
    assert!(asked.is_err(), "it asked the registry: {asked:?}");
}
