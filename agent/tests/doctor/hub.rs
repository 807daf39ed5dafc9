//! The way to the hub: names, refusals, silence, and certificates that are good or not.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection};

use crate::bed::{Bed, Check, Report};

fn look(bed: &Bed, broker: &str, more: &str) -> Report {
    bed.configure(&bed.text(broker, more));
    bed.doctor()
}

#[test]
fn a_name_without_address_and_a_port_where_nobody_listens_are_told_apart() {
    let bed = Bed::new();
    let report = look(&bed, "mqtt://hub.invalid", "");
    assert_eq!(report.code, Some(1));
    assert!(
        report.of("hub.resolve").found.contains("hub.invalid"),
        "{report:#?}"
    );
    assert!(report.of("hub.resolve").fix.unwrap().contains("/etc/hosts"));
    assert_eq!(report.of("hub.connect").level, "info");

    // Bound and closed again: nobody listens there now.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let report = look(&bed, &format!("mqtt://localhost:{port}"), "");
    assert_eq!(report.of("hub.resolve").level, "ok");
    assert!(
        report.of("hub.connect").found.contains("nobody listens"),
        "{report:#?}"
    );
    assert_eq!(report.code, Some(1));
}

#[test]
fn a_broker_that_accepts_and_says_nothing_does_not_hold_the_doctor_up() {
    let bed = Bed::new();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    // The registry is as silent, and both are waited for at the same time.
    let ca = Certificates::new(bed.path());
    let begin = Instant::now();
    let more = format!(
        "ca_file = \"{}\"\nregistry = \"http://{address}\"",
        ca.ca.display()
    );
    let report = look(&bed, &format!("mqtts://{address}"), &more);
    assert!(
        begin.elapsed() < Duration::from_secs(15),
        "{:?}",
        begin.elapsed()
    );
    assert_eq!(report.of("hub.connect").level, "ok");
    assert!(report.of("hub.tls").found.contains("5 s"), "{report:#?}");
    assert_eq!(report.of("registry.reachable").level, "warning");
}

#[test]
fn registries_that_answer_refuse_and_are_not_there_are_told_apart() {
    let bed = Bed::new();
    let answering = |head: &'static str| {
        serve(move |mut stream| {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(head.as_bytes());
        })
    };
    let broker = answering("");
    let absent =
        answering("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    let refusing = answering(
        "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    );
    let report = look(
        &bed,
        &format!("mqtt://{broker}"),
        &format!("registry = \"http://{absent}\"\n[registries.\"{absent}\"]\nplain_http = true"),
    );
    let found = report.of("registry.reachable");
    assert_eq!(found.level, "ok", "{report:#?}");
    assert!(found.found.contains("hub.internal") && found.found.contains(&absent.to_string()));
    let report = look(
        &bed,
        &format!("mqtt://{broker}"),
        &format!("registry = \"http://{refusing}\""),
    );
    let found = report.of("registry.reachable");
    assert_eq!(found.level, "warning", "{report:#?}");
    assert!(
        found.found.contains("token") && !found.found.contains("secret"),
        "{found:?}"
    );
}

#[test]
fn certificates_are_verified_and_each_fault_has_its_own_fix() {
    let bed = Bed::new();
    let certificates = Certificates::new(bed.path());
    let trusted = format!("ca_file = \"{}\"", certificates.ca.display());
    let tls = |name: &str, host: &str, more: &str| -> Check {
        let port = certificates.serve(name).port();
        look(&bed, &format!("mqtts://{host}:{port}"), more).of("hub.tls")
    };

    let good = tls("good", "localhost", &trusted);
    assert_eq!(good.level, "ok", "{good:?}");
    assert!(good.found.contains("TLS 1.3"), "{good:?}");

    let stranger = tls("good", "localhost", "");
    assert!(stranger.found.contains("unknown issuer"), "{stranger:?}");
    assert!(stranger.fix.unwrap().contains("ca_file ="));

    let expired = tls("expired", "localhost", &trusted);
    assert!(expired.found.contains("has expired"), "{expired:?}");

    let other = tls("good", "127.0.0.1", &trusted);
    assert!(other.found.contains("another name"), "{other:?}");

    let plain = serve(|mut stream| {
        let _ = stream.write_all(b"220 not what you think\r\n");
        let mut rest = [0; 512];
        let _ = stream.read(&mut rest);
    });
    let plain = look(
        &bed,
        &format!("mqtts://localhost:{}", plain.port()),
        &trusted,
    )
    .of("hub.tls");
    assert!(plain.found.contains("does not speak TLS"), "{plain:?}");

    let missing = tls("good", "localhost", "ca_file = \"/nonexistent/ca.pem\"");
    assert!(missing.found.contains("/nonexistent/ca.pem"), "{missing:?}");
}

/// Answers every connection with `answer`, for as long as the test runs; ports are of the local host, both address
/// families where the machine has them.
fn serve(answer: impl Fn(std::net::TcpStream) + Send + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || answer(stream));
        }
    });
    address
}

/// An authority and what it signed, made with openssl(1).
struct Certificates {
    dir: PathBuf,
    ca: PathBuf,
}

impl Certificates {
    fn new(dir: &Path) -> Self {
        let certificates = Self {
            dir: dir.to_owned(),
            ca: dir.join("ca.pem"),
        };
        certificates.openssl(&format!(
            "req -x509 {KEY} -keyout ca.key -out ca.pem -days 3650 -subj /CN=ca"
        ));
        for (name, dates) in [
            ("good", "-days 3650"),
            (
                "expired",
                "-not_before 20200101000000Z -not_after 20210101000000Z",
            ),
        ] {
            certificates.openssl(&format!(
                "req -new {KEY} -keyout {name}.key -out {name}.csr -subj /CN=hub -addext subjectAltName=DNS:localhost"
            ));
            certificates.sign(name, dates);
        }
        certificates
    }

    fn sign(&self, name: &str, dates: &str) {
        // Not `x509 -req`: only newer ones take dates there.
        let settings = "[ca]\ndefault_ca=x\n[x]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\n\
                        policy=p\ncopy_extensions=copy\nunique_subject=no\nemail_in_dn=no\nrand_serial=yes\n[p]\ncommonName=supplied\n";
        std::fs::write(self.dir.join("ca.cnf"), settings).unwrap();
        std::fs::write(self.dir.join("index"), "").unwrap();
        let dates = dates
            .replace("-not_before", "-startdate")
            .replace("-not_after", "-enddate");
        self.openssl(&format!(
            "ca -batch -config ca.cnf -cert ca.pem -keyfile ca.key -in {name}.csr -out {name}.pem -notext {dates}"
        ));
    }

    fn openssl(&self, arguments: &str) {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(&self.dir)
            .output()
            .expect("openssl is there: cargo xtask test installs it");
        assert!(
            output.status.success(),
            "openssl {arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Speaks TLS with that certificate.
    fn serve(&self, name: &str) -> SocketAddr {
        let chain = CertificateDer::pem_file_iter(self.dir.join(format!("{name}.pem")))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let key = PrivateKeyDer::from_pem_file(self.dir.join(format!("{name}.key"))).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let config = Arc::new(config);
        serve(move |mut stream| {
            let mut connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            while connection.is_handshaking() && connection.complete_io(&mut stream).is_ok() {}
            let mut rest = [0; 512];
            let _ = stream.read(&mut rest);
        })
    }
}

const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
