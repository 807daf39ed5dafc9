//! What policies allow, and which files are policies.

use std::os::unix::fs::PermissionsExt as _;

use foreshore_protocol::Digest;
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn source(dir: &tempfile::TempDir) -> Source {
    Source {
        path: dir.path().join("policy.toml"),
        required: false,
        own: vec!["/var/lib/foreshore".into(), "/run/foreshore".into()],
    }
}

fn load(text: &str) -> Result<Policy, PolicyError> {
    let dir = tempfile::tempdir().unwrap();
    let source = source(&dir);
    std::fs::write(&source.path, text).unwrap();
    std::os::unix::fs::chown(&source.path, Some(0), Some(0)).expect("tests run as root");
    source.load()
}

fn policy(text: &str) -> Policy {
    load(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn release(service: serde_json::Value) -> Release {
    let mut whole = json!({"image": format!("hub.internal/x@{}", Digest::of(b"x"))});
    let serde_json::Value::Object(more) = service else {
        panic!("an object")
    };
    whole.as_object_mut().unwrap().extend(more);
    let release = json!({"schema": 1, "app": "gateway", "services": {"modbus": whole}});
    let release: Release = serde_json::from_value(release).unwrap();
    release.check().unwrap();
    release
}

fn denied(policy: &Policy, service: serde_json::Value) -> String {
    let release = release(service);
    allows(policy, &release.app, &release)
        .expect_err("it must be denied")
        .to_string()
}

fn is_allowed(policy: &Policy, service: serde_json::Value) -> bool {
    let release = release(service);
    allows(policy, &release.app, &release).is_ok()
}

#[test]
fn without_a_policy_an_app_gets_nothing_of_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let none = source(&dir).load().unwrap();
    let file = dir.path().join("policy.toml").display().to_string();
    for (service, asked, line) in [
        (
            json!({"devices": ["/dev/ttyUSB0"]}),
            "device /dev/ttyUSB0",
            "devices = [\"/dev/ttyUSB0\"]",
        ),
        (
            json!({"volumes": ["/etc/acme:/etc/acme:ro"]}),
            "/etc/acme",
            "binds = [{path = \"/etc/acme\"}]",
        ),
        (
            json!({"volumes": ["/srv/x:/data"]}),
            "/srv/x for writing",
            "binds = [{path = \"/srv/x\", read_only = false}]",
        ),
        (
            json!({"network_mode": "host"}),
            "network_mode: host",
            "host_network = true",
        ),
    ] {
        let why = denied(&none, service);
        for part in ["service modbus", asked, line, &file] {
            assert!(why.contains(part), "{part}: {why}");
        }
        // The line that it says does what it says.
        assert!(load(line).is_ok(), "{line}");
    }
    assert!(is_allowed(
        &none,
        json!({"volumes": ["data:/data"], "tmpfs": ["/tmp"], "mem_limit": "4g"})
    ));
    let mut required = source(&dir);
    required.required = true;
    assert!(matches!(required.load(), Err(PolicyError::Read { .. })));
}

#[test]
fn what_is_named_is_allowed_and_no_more() {
    let policy = policy(
        "host_network = true\ndevices = [\"/dev/ttyUSB*\", \"/dev/serial/by-id/usb-ACME_?\"]\n\
         binds = [{path = \"/etc/acme\"}, {path = \"/srv/acme\", read_only = false}]\n\
         [max]\nmem_limit = \"64m\"\ncpus = \"0.5\"\npids_limit = 100\n",
    );
    let small = |more: serde_json::Value| {
        let mut service = json!({"mem_limit": "64m", "cpus": "0.5", "pids_limit": 100});
        let more = more.as_object().unwrap().clone();
        service.as_object_mut().unwrap().extend(more);
        service
    };
    for good in [
        json!({"devices": ["/dev/ttyUSB0:/dev/modem:r", "/dev/serial/by-id/usb-ACME_7"]}),
        json!({"volumes": ["/etc/acme:/a:ro", "/etc/acme/x:/b:ro", "/srv/acme:/c", "/srv/acme/d:/d:ro"]}),
        json!({"network_mode": "host"}),
    ] {
        assert!(is_allowed(&policy, small(good.clone())), "{good}");
    }
    for bad in [
        json!({"devices": ["/dev/ttyUSB0", "/dev/ttyS0"]}),
        json!({"devices": ["/dev/ttyUSB/0"]}),
        json!({"devices": ["/dev/serial/by-id/usb-ACME_77"]}),
        json!({"volumes": ["/etc/acme:/a"]}),
        json!({"volumes": ["/etc/acmex:/a:ro"]}),
        json!({"volumes": ["/etc:/a:ro"]}),
        json!({"mem_limit": "65m"}),
        json!({"cpus": "0.51"}),
        json!({"pids_limit": 101}),
    ] {
        denied(&policy, small(bad));
    }
    let why = denied(&policy, small(json!({"volumes": ["/etc/acme:/a"]})));
    assert!(why.contains("add :ro"), "{why}");
    let why = denied(&policy, json!({"mem_limit": "65m"}));
    assert!(
        why.contains("the most is 64m") && why.contains("[max]"),
        "{why}"
    );
}

#[test]
fn an_apps_table_replaces_what_it_names() {
    let policy = policy(
        "host_network = true\ndevices = [\"/dev/i2c-1\"]\n\
         [apps.gateway]\nhost_network = false\n[apps.other]\ndevices = []\n",
    );
    assert!(is_allowed(&policy, json!({"devices": ["/dev/i2c-1"]})));
    let why = denied(&policy, json!({"network_mode": "host"}));
    assert!(why.contains("[apps.gateway]"), "{why}");
    let other = policy.grant(&"other".parse().unwrap());
    assert!(!other.allows_device("/dev/i2c-1"));
    let unnamed = policy.grant(&"unnamed".parse().unwrap());
    assert!(unnamed.allows_device("/dev/i2c-1"));
}

#[test]
fn no_policy_gives_away_the_kernel_or_the_agent() {
    let policy = policy(
        "binds = [{path = \"/var\", read_only = false}, {path = \"/run\"}, {path = \"/etc\"}]\n",
    );
    for bad in [
        "/",
        "/proc",
        "/proc/1",
        "/sys/fs/cgroup",
        "/dev",
        "/dev/shm",
        "/var",
        "/var/lib",
        "/var/lib/foreshore",
        "/var/lib/foreshore/volumes/other",
        "/run",
        "/run/foreshore",
    ] {
        denied(&policy, json!({"volumes": [format!("{bad}:/data:ro")]}));
    }
    assert!(is_allowed(
        &policy,
        json!({"volumes": ["/var/log:/data:ro", "/run/other:/x:ro"]})
    ));
    // Nor the policy itself.
    let grant = policy.grant(&"gateway".parse().unwrap());
    let file = policy.path.clone();
    assert!(grant.allows_bind("web", "x", &file, true).is_err());
}

#[test]
fn mistakes_in_the_file_are_named_with_their_place() {
    for (text, named) in [
        ("device = []\n", "device"),
        ("\nhost_network = 1\n", "line 2"),
        ("devices = [\"ttyUSB0\"]\n", "below /dev"),
        ("devices = [\"/dev/../etc\"]\n", "below /dev"),
        ("devices = [\"/dev/tty[0-9]\"]\n", "only * and ?"),
        ("binds = [{path = \"etc\"}]\n", "absolute"),
        ("binds = [{path = \"/\"}]\n", "below /"),
        ("binds = [{path = \"/a/../b\"}]\n", "without .."),
        ("binds = [{path = \"/proc/sys\"}]\n", "kernel"),
        ("[apps.gateway]\nbinds = [{path = \"/sys\"}]\n", "kernel"),
        ("[apps.Gateway]\n", "Gateway"),
        ("[max]\nmem_limit = \"much\"\n", "much"),
        ("[max]\nmemory = \"1g\"\n", "memory"),
    ] {
        let error = crate::causes::chain(&load(text).expect_err(text));
        assert!(
            error.contains(named) && error.contains("policy.toml"),
            "{text}: {error}"
        );
    }
    let long = format!("# {}\n", "x".repeat(70_000));
    assert!(load(&long).unwrap_err().to_string().contains("65536"));
}

#[test]
fn a_file_that_others_may_write_is_no_policy() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(&dir);
    std::fs::write(&source.path, "host_network = true\n").unwrap();
    for (mode, owner, word) in [
        (0o664, 0, "mode 664"),
        (0o646, 0, "mode 646"),
        (0o644, 1000, "uid 1000"),
    ] {
        std::fs::set_permissions(&source.path, std::fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(&source.path, Some(owner), None).expect("tests run as root");
        let error = source.load().unwrap_err().to_string();
        assert!(
            error.contains(word) && error.contains("chmod 644"),
            "{error}"
        );
    }
    std::fs::remove_file(&source.path).unwrap();
    std::fs::create_dir(&source.path).unwrap();
    assert!(
        source
            .load()
            .unwrap_err()
            .to_string()
            .contains("not a regular file")
    );
}

#[test]
fn a_changed_file_is_read_again_and_a_broken_one_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(&dir);
    let mut watched = Watched::new(source.clone());
    assert!(watched.refresh() && !watched.refresh());
    assert!(!watched.policy().as_ref().unwrap().host_network);
    std::fs::write(&source.path, "host_network = true\n").unwrap();
    assert!(watched.refresh() && !watched.refresh());
    assert!(watched.policy().as_ref().unwrap().host_network);
    std::fs::write(&source.path, "host_network = maybe\n").unwrap();
    assert!(watched.refresh());
    assert!(watched.policy().is_err());
    std::fs::remove_file(&source.path).unwrap();
    assert!(watched.refresh());
    assert!(!watched.policy().as_ref().unwrap().host_network);
}

proptest! {
    #[test]
    fn any_text_is_a_policy_or_an_error(text in "\\PC{0,200}") {
        let _ = toml::from_str::<Policy>(&text);
    }

    /// Against the plainest way to say what a pattern means.
    #[test]
    fn patterns_match_what_they_say(pattern in "[ab*?]{0,8}", part in "[ab]{0,8}") {
        fn plain(pattern: &[u8], part: &[u8]) -> bool {
            match (pattern.split_first(), part.split_first()) {
                (None, None) => true,
                (Some((b'*', rest)), None) => plain(rest, part),
                (Some((b'*', rest)), Some((_, others))) => plain(rest, part) || plain(pattern, others),
                (Some((b'?', rest)), Some((_, others))) => plain(rest, others),
                (Some((a, rest)), Some((b, others))) => a == b && plain(rest, others),
                _ => false,
            }
        }
        prop_assume!(!pattern.is_empty() && !part.is_empty());
        let whole = DevicePattern::try_from(format!("/dev/{pattern}")).unwrap();
        prop_assert_eq!(whole.matches(&format!("/dev/{part}")), plain(pattern.as_bytes(), part.as_bytes()));
    }
}

/// What `openssl pkey -pubout` writes.
const KEY: &str = "'''-----BEGIN PUBLIC KEY-----\n\
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAElSj0n6mdVUBkACLrW1OmYLkFWR3A\n\
iECnyg+r4gCfH3EF/cHPbNgaEpGqAuQTaVy6X66YHrGitZ1e206mlb8mqg==\n\
-----END PUBLIC KEY-----'''";

fn wanted(policy: &Policy, app: &str, image: &str) -> usize {
    let app = app.parse().unwrap();
    policy.demands(Some(&app), image).len()
}

#[test]
fn an_image_needs_what_every_rule_that_means_it_wants() {
    let nothing = policy("");
    assert_eq!(wanted(&nothing, "gateway", "ghcr.io/acme/web"), 0);
    let some = policy(&format!(
        "[[signatures]]\nimages = [\"ghcr.io/acme/*\", \"hub.internal/*\"]\nkeys = [{KEY}]\n\
         [[signatures]]\nkeys = [{KEY}, {KEY}]\n\
         [[apps.own.signatures]]\nimages = [\"hub.internal/own\"]\nkeys = [{KEY}]\n\
         [apps.free]\nsignatures = []\n[apps.other]\nhost_network = true\n"
    ));
    for (app, image, count) in [
        ("gateway", "ghcr.io/acme/web", 2),
        ("gateway", "ghcr.io/acme/deep/web", 2),
        ("gateway", "ghcr.io/acmeweb", 1),
        ("gateway", "docker.io/library/nginx", 1),
        ("other", "hub.internal/x", 2),
        ("own", "hub.internal/own", 1),
        ("own", "hub.internal/x", 0),
        ("free", "ghcr.io/acme/web", 0),
    ] {
        assert_eq!(wanted(&some, app, image), count, "{app} {image}");
    }
    assert_eq!(some.demands(None, "hub.internal/own").len(), 2);
    let named = some.demands(None, "x.example/y")[0].by;
    assert!(named.ends_with("policy.toml"), "{named}");
}

#[test]
fn rules_that_cannot_be_meant_are_refused() {
    for (images, keys, named) in [
        ("\"*\"", "", "can be met by no image"),
        ("", KEY, "means none"),
        ("\"\"", KEY, "no pattern"),
        ("\"ghcr.io/Acme\"", KEY, "no pattern"),
        ("\"ghcr.io/acme/web:1\"", KEY, "tag"),
        ("\"nginx\"", KEY, "docker.io/library"),
        ("\"*\"", "\"AAAA\"", "cosign.pub"),
        ("\"*\"", "\"/etc/cosign.pub\"", "cosign.pub"),
    ] {
        let text = format!("[[signatures]]\nimages = [{images}]\nkeys = [{keys}]\n");
        let error = load(&text).unwrap_err().to_string();
        assert!(error.contains(named), "{images} {keys}: {error}");
    }
    let unknown = format!("[[signatures]]\nkeys = [{KEY}]\nidentity = \"me\"\n");
    assert!(load(&unknown).unwrap_err().to_string().contains("identity"));
}
