//! Gates that ask, with real programs to ask: Prometheus, and HTTP servers that mean well or ill.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bed::{Bed, Kind, manifest, wait_for, wait_until};
use crate::device::Device;

/// A server that answers every request with what it is set to, and remembers the requests.
#[derive(Debug, Clone)]
struct Server {
    address: String,
    answer: Arc<Mutex<Vec<u8>>>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap().to_string(),
            answer: Arc::default(),
            asked: Arc::default(),
        };
        let serving = server.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let serving = serving.clone();
                std::thread::spawn(move || serving.serve(client));
            }
        });
        server
    }

    fn serve(&self, mut client: TcpStream) {
        let mut request = Vec::new();
        let mut buffer = [0; 4096];
        // Head, and as much of a body as it announces.
        while let Ok(read @ 1..) = client.read(&mut buffer) {
            request.extend_from_slice(&buffer[..read]);
            let text = String::from_utf8_lossy(&request).to_lowercase();
            let length = text
                .split_once("content-length: ")
                .and_then(|(_, rest)| rest.split("\r\n").next()?.parse::<usize>().ok());
            let whole = text
                .split_once("\r\n\r\n")
                .is_some_and(|(_, body)| body.len() >= length.unwrap_or(0));
            if whole {
                break;
            }
        }
        let answer = self.answer.lock().unwrap().clone();
        let text = String::from_utf8_lossy(&request).into_owned();
        self.asked.lock().unwrap().push(text);
        // One that says nothing keeps the connection open for longer than anybody waits.
        if answer.is_empty() {
            std::thread::sleep(Duration::from_secs(15));
        }
        _ = client.write_all(&answer);
        _ = client.shutdown(Shutdown::Write);
    }

    fn set(&self, status: &str, headers: &str, body: &[u8]) {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n",
            body.len()
        );
        *self.answer.lock().unwrap() = [head.as_bytes(), body].concat();
    }

    fn json(&self, body: &Value) {
        self.set("200 OK", "", body.to_string().as_bytes());
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn with_analysis(image: &str, waves: &str, gates: &str, more: &str) -> String {
    manifest("shop", image, waves).replace(
        "soak: 0s",
        &format!("analysis: [{gates}], onFailure: pause, {more}soak: 0s"),
    )
}

fn allowing(hosts: &[&str]) -> String {
    format!("[analysis]\nhosts = {}\n", json!(hosts))
}

fn await_state(bed: &Bed, state: &str) -> Value {
    bed.await_rollout("shop", state)
}

fn await_message(bed: &Bed, part: &str) -> Value {
    wait_for(&format!("{part:?} in the rollout's message"), || {
        let rollout = bed.rollout("shop");
        let said = rollout["message"].as_str().unwrap_or_default();
        if said.contains(part) {
            Ok(rollout)
        } else {
            Err(rollout.to_string())
        }
    })
}

fn resume(bed: &Bed) {
    let id = &bed.rollout("shop")["id"];
    let (status, body) = bed.call("POST", &format!("/rollouts/{id}/resume"), b"");
    assert_eq!(status, 200, "{body}");
}

#[test]
fn a_webhook_judges_each_wave_and_a_restarted_hub_asks_again() {
    let server = Server::start();
    let mut bed = Bed::start_with(Kind::Embedded, &allowing(&[&server.address]));
    let _devices = Device::fleet(&bed, 3);
    let image = bed.import("v1");
    server.json(&json!({"verdict": "pass", "message": "all quiet"}));
    let gate = format!(
        "{{name: judge, webhook: {{url: \"http://{}/judge\"}}, interval: 1s, count: 2}}",
        server.address
    );
    let written = with_analysis(&image, "[{count: 1}]", &gate, "");
    let release = bed.apply("shop", &written)["release"].clone();
    let rollout = await_state(&bed, "completed");
    for wave in 0..2 {
        let said = &rollout["waves"][wave]["analysis"][0];
        assert_eq!(said["name"], "judge", "{rollout}");
        assert!(said["passed"].as_u64().unwrap() >= 2, "{rollout}");
        assert_eq!(said["message"], "all quiet");
    }
    let asked = server.asked();
    let bodies: Vec<Value> = asked
        .iter()
        .map(|request| {
            assert!(request.starts_with("POST /judge HTTP/1.1"), "{request}");
            let (_, body) = request.split_once("\r\n\r\n").unwrap();
            serde_json::from_str(body).unwrap()
        })
        .collect();
    assert_eq!(
        (&bodies[0]["app"], &bodies[0]["release"], &bodies[0]["wave"]),
        (&json!("shop"), &release, &json!(1))
    );
    assert_eq!(
        bodies[0]["devices"],
        json!({"total": 1, "succeeded": 1, "failed": 0, "deferred": 0})
    );
    assert_eq!(bodies.last().unwrap()["allDevices"]["succeeded"], 3);

    // Killed while a wave waits for its gate: nothing was decided, and it is asked again.
    let next = bed.import("v2");
    server.json(&json!({"verdict": "inconclusive"}));
    let gate = gate.replace("count: 2", "inconclusiveLimit: 1000");
    bed.apply("shop", &with_analysis(&next, "[{count: 1}]", &gate, ""));
    wait_until("some doubts", || {
        bed.rollout("shop")["waves"][0]["analysis"][0]["inconclusive"].as_u64() >= Some(2)
    });
    bed.kill_hub();
    bed.start_hub();
    let kept = bed.rollout("shop");
    assert_eq!(kept["waves"][0]["state"], "baking", "{kept}");
    assert!(
        kept["waves"][0]["analysis"][0]["inconclusive"].as_u64() >= Some(2),
        "{kept}"
    );
    server.json(&json!({"verdict": "fail", "message": "p99 doubled"}));
    bed.await_online(3);
    let failed = await_message(&bed, "p99 doubled");
    assert_eq!(
        (&failed["state"], &failed["waves"][0]["state"]),
        (&json!("paused"), &json!("failed"))
    );
    assert_eq!(failed["waves"][1]["state"], "pending", "nobody else got it");
    assert!(bed.event_kinds().contains(&"analysis-failed".to_owned()));
    server.json(&json!({"verdict": "pass"}));
    resume(&bed);
    await_state(&bed, "completed");
}

#[test]
fn no_answer_is_ever_a_verdict() {
    let (server, elsewhere) = (Server::start(), Server::start());
    elsewhere.json(&json!({"verdict": "pass"}));
    let bed = Bed::start_with(Kind::Embedded, &allowing(&[&server.address]));
    let _devices = Device::fleet(&bed, 1);
    let image = bed.import("v1");
    let gate = format!(
        "{{name: judge, webhook: {{url: \"http://{}\"}}, interval: 1s, inconclusiveLimit: 0}}",
        server.address
    );
    server.set("200 OK", "", b"<html>pass</html>");
    bed.apply("shop", &with_analysis(&image, "[{count: 1}]", &gate, ""));
    await_message(&bed, "the answer is not");

    let location = format!("Location: http://{}/\r\n", elsewhere.address);
    server.set("302 Found", &location, b"");
    resume(&bed);
    await_message(&bed, "redirects");
    assert_eq!(elsewhere.asked(), Vec::<String>::new(), "nobody went there");

    let mut huge = b"{\"verdict\":\"pass\",\"message\":\"".to_vec();
    huge.resize(2 << 20, b'x');
    server.set("200 OK", "", &huge);
    resume(&bed);
    await_message(&bed, "more than 1048576 bytes");

    server.set(
        "503 Service Unavailable",
        "",
        b"{\"message\":\"come\\u001b[2Jback\"}",
    );
    resume(&bed);
    let paused = await_message(&bed, "HTTP 503: come");
    assert!(!paused["message"].as_str().unwrap().contains('\u{1b}'));

    // It takes the connection and says nothing: three times ten seconds, and the hub is as quick as ever.
    server.answer.lock().unwrap().clear();
    server.asked.lock().unwrap().clear();
    resume(&bed);
    let begun = Instant::now();
    wait_until("the question", || !server.asked().is_empty());
    bed.get("/devices");
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "the hub waits along"
    );
    await_message(&bed, "cannot be asked");

    server.json(&json!({"verdict": "pass"}));
    resume(&bed);
    await_state(&bed, "completed");
}

#[test]
fn only_configured_hosts_are_asked_and_tokens_go_over_https_only() {
    let server = Server::start();
    let bed = Bed::start_with(Kind::Embedded, &allowing(&["prometheus.example.com"]));
    let image = bed.import("v1");
    for (gate, code, part) in [
        (
            format!("{{name: x, webhook: {{url: \"http://{}\"}}}}", server.address),
            "analysis-host-not-allowed",
            format!("hosts = [\"{}\"]", server.address),
        ),
        (
            "{name: x, promql: {url: \"http://169.254.169.254\", query: up, passIf: \"> 0\"}}".to_owned(),
            "analysis-host-not-allowed",
            "169.254.169.254:80".to_owned(),
        ),
        (
            "{name: x, promql: {url: \"https://prometheus.example.com\", query: up, passIf: \"> 0\", bearerSecret: token}}".to_owned(),
            "secret-not-set",
            "secret set token".to_owned(),
        ),
        (
            "{name: x, webhook: {url: \"http://prometheus.example.com\", bearerSecret: token}}".to_owned(),
            "bad-manifest",
            "https://".to_owned(),
        ),
        (
            "{name: x, promql: {url: \"https://prometheus.example.com\", query: \"up{a=\\\"${host}\\\"}\", passIf: \"> 0\"}}".to_owned(),
            "bad-manifest",
            "app, release, rollout, wave".to_owned(),
        ),
        ("{name: x}".to_owned(), "bad-manifest", "exactly one of".to_owned()),
    ] {
        let written = with_analysis(&image, "[{count: 1}]", &gate, "");
        for (method, path) in [("PUT", "/apps/shop"), ("POST", "/apps/shop/plan")] {
            let (status, body) = bed.call(method, path, written.as_bytes());
            assert_eq!(body["code"], code, "{status} {body}");
            assert!(body["detail"].as_str().unwrap().contains(&part), "{body}");
        }
    }
    assert_eq!(bed.get("/apps")["items"], json!([]));
    assert_eq!(server.asked(), Vec::<String>::new());
    // A secret that an analysis sends stays as long as the app.
    let (status, _) = bed.call("PUT", "/secrets/token", b"hush-hush");
    assert_eq!(status, 200);
    let gate = "{name: x, webhook: {url: \"https://prometheus.example.com\", bearerSecret: token}}";
    let applied = bed.apply("shop", &with_analysis(&image, "[{count: 1}]", gate, ""));
    assert_eq!(applied["outcome"], "created");
    let (_, refused) = bed.call("DELETE", "/secrets/token", b"");
    assert_eq!(refused["code"], "secret-in-use");
    assert!(!bed.get("/apps/shop").to_string().contains("hush-hush"));
}

#[test]
fn devices_with_the_release_are_held_against_those_without() {
    use crate::device::Kick;
    let bed = Bed::start(Kind::Embedded);
    let devices = Device::fleet(&bed, 12);
    let [one, two] = ["v1", "v2"].map(|tag| bed.import(tag));
    bed.apply("shop", &manifest("shop", &one, "[{percent: 100}]"));
    bed.await_rollout("shop", "completed");
    let gate = "{name: memory, control: {metric: memory}, interval: 1s, inconclusiveLimit: 1000}";
    let written = with_analysis(&two, "[{count: 6}, {percent: 100}]", gate, "");
    let release = bed.apply("shop", &written)["release"].clone();
    // Those with the new release use more and more.
    let beacons = |leak: u32| {
        for (number, device) in devices.iter().enumerate() {
            let runs = device.running("shop").map(|digest| digest.to_string());
            let new = runs.as_deref() == release.as_str();
            let noise = u32::try_from(number % 3).unwrap();
            let memory = 100 + noise + if new { leak } else { 0 };
            device.kick(Kick::Gauges(memory));
        }
    };
    wait_until("the first wave to bake", || {
        bed.rollout("shop")["waves"][0]["state"] == "baking"
    });
    wait_until("doubts without gauges", || {
        bed.rollout("shop")["waves"][0]["analysis"][0]["inconclusive"].as_u64() >= Some(1)
    });
    beacons(200);
    let failed = await_message(&bed, "analysis memory of wave 1 failed");
    assert!(
        failed["message"].as_str().unwrap().contains("6 without it"),
        "{failed}"
    );
    assert_eq!(failed["waves"][1]["state"], "pending");
    beacons(3);
    resume(&bed);
    let done = await_state(&bed, "completed");
    let last = &done["waves"][1]["analysis"][0];
    assert!(
        last["message"]
            .as_str()
            .unwrap()
            .contains("nothing to compare"),
        "{done}"
    );
}

/// Debian's Prometheus, scraping one target every second. Killed when dropped.
#[derive(Debug)]
struct Prometheus {
    child: Child,
    address: String,
}

impl Prometheus {
    fn start(bed: &Bed, target: &str) -> Self {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let address = port.to_string();
        let config = bed.path("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: shop\n  static_configs:\n  - targets: [\"{target}\"]\n"
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(bed.path("prometheus.log")).unwrap();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                bed.path("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("prometheus: {error}; install prometheus, or run cargo xtask test")
        });
        Self { child, address }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

#[test]
fn prometheus_judges_with_a_metric_of_the_app() {
    let metrics = Server::start();
    let errors = |rate: f64| {
        let text =
            format!("# TYPE shop_error_ratio gauge\nshop_error_ratio{{app=\"shop\"}} {rate}\n");
        metrics.set(
            "200 OK",
            "Content-Type: text/plain; version=0.0.4\r\n",
            text.as_bytes(),
        );
    };
    errors(0.001);
    let mut bed = Bed::start(Kind::Embedded);
    let prometheus = Prometheus::start(&bed, &metrics.address);
    bed.kill_hub();
    bed.configure_more(&allowing(&[&prometheus.address]));
    bed.start_hub();
    let _devices = Device::fleet(&bed, 2);
    let [one, two] = ["v1", "v2"].map(|tag| bed.import(tag));
    let gate = format!(
        "{{name: errors, interval: 1s, count: 2, inconclusiveLimit: 100, promql: {{url: \"http://{}\", \
         query: 'max(shop_error_ratio{{app=\"${{app}}\"}})', passIf: \"< 0.01\"}}}}",
        prometheus.address
    );
    bed.apply("shop", &with_analysis(&one, "[{count: 1}]", &gate, ""));
    let done = await_state(&bed, "completed");
    let said = &done["waves"][0]["analysis"][0];
    assert_eq!(said["message"], "0.001, to be < 0.01", "{done}");

    errors(0.5);
    // Prometheus has seen it before the next wave is judged by it.
    wait_for("prometheus to scrape", || {
        let url = format!(
            "http://{}/api/v1/query?query=shop_error_ratio",
            prometheus.address
        );
        let mut answer = ureq::get(&url).call().map_err(|error| error.to_string())?;
        let body = answer.body_mut().read_to_string().unwrap();
        if body.contains("\"0.5\"") {
            Ok(())
        } else {
            Err(body)
        }
    });
    bed.apply("shop", &with_analysis(&two, "[{count: 1}]", &gate, ""));
    let failed = await_message(&bed, "analysis errors of wave 1 failed: 0.5, to be < 0.01");
    assert_eq!(
        (&failed["state"], &failed["waves"][1]["state"]),
        (&json!("paused"), &json!("pending"))
    );
}
