//! Network namespaces, and connections into them.

use foreshore_agent::runtime::Runtime as _;
use serde_json::json;

use crate::bed::{Bed, LONG, run, wait_for};

#[tokio::test]
async fn two_containers_serve_the_same_port_and_are_reached_inside() {
    let bed = Bed::new();
    let runtime = bed.runtime();
    let mut specs = Vec::new();
    for name in ["one", "two"] {
        let line = format!(
            "mkdir -p /srv/www; echo I am {name} > /srv/www/index.html; exec httpd -f -p 8080 -h /srv/www"
        );
        let spec = bed.spec(
            name,
            &json!(["sh", "-c", line]),
            json!({"tmpfs": ["/srv/www"]}),
        );
        runtime.start(&spec).await.unwrap();
        specs.push((name, spec));
    }
    let before = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    for (name, spec) in &specs {
        let mut answer = String::new();
        wait_for("the server answers", || async {
            runtime.connect(&spec.id, 8080, LONG).await.is_ok()
        })
        .await;
        let mut stream = runtime.connect(&spec.id, 8080, LONG).await.unwrap();
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains(&format!("I am {name}")), "{answer}");
    }
    let error = runtime.connect(&specs[0].1.id, 81, LONG).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(
        std::fs::read_link("/proc/thread-self/ns/net").unwrap(),
        before
    );
    // None of it is reachable from the device.
    assert!(std::net::TcpStream::connect("127.0.0.1:8080").is_err());
}

#[tokio::test]
async fn network_none_has_only_loopback_and_host_has_the_devices_network() {
    let bed = Bed::new();
    let (_, log) = run(&bed, &bed.shell("ip -o link; hostname", json!({}))).await;
    assert!(
        log.lines()
            .filter(|line| line.contains("mtu"))
            .all(|line| line.contains(" lo:") || line.contains("NOARP")),
        "{log}"
    );
    assert!(log.contains("LOOPBACK,UP"), "{log}");

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().map(drop).count());
    let line = format!("nc 127.0.0.1 {port} </dev/null && hostname && cat /etc/resolv.conf");
    let (exit, log) = run(&bed, &bed.shell(&line, json!({"network_mode": "host"}))).await;
    assert_eq!(exit.code, 0, "{log}");
    let name = nix::unistd::gethostname().unwrap();
    assert!(log.contains(name.to_str().unwrap()), "{log}");
    assert!(
        log.contains(std::fs::read_to_string("/etc/resolv.conf").unwrap().trim()),
        "{log}"
    );

    let runtime = bed.runtime();
    let spec = bed.shell("sleep 1000", json!({"network_mode": "host"}));
    runtime.start(&spec).await.unwrap();
    runtime.connect(&spec.id, port, LONG).await.unwrap();
}
