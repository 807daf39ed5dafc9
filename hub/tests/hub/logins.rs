//! Secrets with logins: what the hub asks registries with, for which app, and what it takes for one.

use serde_json::{Value, json};

use crate::bed::{Bed, Kind, manifest};
use crate::upstream::Upstream;

/// `app:app-password` and `hub:hub-password`.
const APP: &str = "YXBwOmFwcC1wYXNzd29yZA==";
const HUB: &str = "aHViOmh1Yi1wYXNzd29yZA==";

fn private(app: &str, image: &str, secrets: &str) -> String {
    let text = manifest(app, image, "[{percent: 100}]");
    text.replace(
        "spec:\n",
        &format!("spec:\n  imagePullSecrets: {secrets}\n"),
    )
}

fn login(host: &str, auth: &str) -> Vec<u8> {
    json!({"auths": {host: {"auth": auth}}})
        .to_string()
        .into_bytes()
}

fn put(bed: &Bed, secret: &str, value: &[u8]) {
    let (status, body) = bed.call("PUT", &format!("/secrets/{secret}"), value);
    assert_eq!(status, 200, "{body}");
}

/// What is said of a manifest that is refused.
fn refused(bed: &Bed, app: &str, manifest: &str) -> String {
    let (status, body) = bed.call("PUT", &format!("/apps/{app}"), manifest.as_bytes());
    assert_eq!(status, 422, "{body}");
    let text = body.to_string();
    for secret in [APP, HUB, "app-password", "hunter2"] {
        assert!(!text.contains(secret), "{text}");
    }
    body["code"].as_str().unwrap().to_owned()
}

fn admit(upstream: &Upstream, auths: &[&str]) {
    upstream.change(|inner| {
        inner.admitted = auths.iter().map(|auth| format!("Basic {auth}")).collect();
    });
}

#[test]
fn images_are_resolved_with_the_logins_of_their_app_and_of_no_other() {
    let up = Upstream::start();
    up.image("1", b"layer");
    admit(&up, &[APP]);
    let configuration = format!("[registries.\"{}\"]\nplain_http = true\n", up.host);
    let bed = Bed::start_with(Kind::Embedded, &configuration);
    let image = format!("{}/team/app:1", up.host);
    let app = |secrets: &str| private("web", &image, secrets);

    assert_eq!(refused(&bed, "web", &app("[login]")), "secret-not-set");
    assert_eq!(refused(&bed, "web", &app("[]")), "unknown-image");
    put(&bed, "login", &login("elsewhere.example", APP));
    assert_eq!(refused(&bed, "web", &app("[login]")), "unknown-image");
    put(&bed, "login", &login(&up.host, HUB));
    assert_eq!(refused(&bed, "web", &app("[login]")), "unknown-image");
    put(&bed, "first", &login(&up.host, APP));
    // The first that has one counts.
    assert_eq!(
        refused(&bed, "web", &app("[login, first]")),
        "unknown-image"
    );
    bed.apply("web", &app("[first, {name: login}]"));
    // Nobody else has it.
    let other = private("other", &image, "[]");
    assert_eq!(refused(&bed, "other", &other), "unknown-image");

    let uses = |secret: &str| bed.get(&format!("/secrets/{secret}"))["apps"].clone();
    assert_eq!(
        (uses("first"), uses("login")),
        (json!(["web"]), json!(["web"]))
    );
    assert_eq!(
        bed.call("DELETE", "/secrets/login", b"").1["code"],
        "secret-in-use"
    );
    // Another list is another release, of the same services.
    let before = bed.get("/apps/web")["release"].clone();
    let (status, plan) = bed.call("POST", "/apps/web/plan", app("[first]").as_bytes());
    assert_eq!(
        (status, &plan["services"][0]["change"]),
        (200, &json!("unchanged"))
    );
    let warned = plan["warnings"].to_string();
    assert!(warned.contains("imagePullSecrets"), "{warned}");
    assert_ne!(bed.apply("web", &app("[first]"))["release"], before);
}

#[test]
fn what_one_app_may_see_is_not_kept_for_all_and_the_hub_s_own_login_counts() {
    let up = Upstream::start();
    up.image("1", b"layer");
    admit(&up, &[APP, HUB]);
    let mut bed = Bed::start_with(Kind::Embedded, &up.configuration(""));
    let image = format!("{}/team/app:1", up.host);
    put(&bed, "login", &login(&up.host, APP));
    bed.apply("web", &private("web", &image, "[login]"));
    // Through the hub's cache nobody sees what came of it.
    let path = format!("/v2/{}/team/app/manifests/1", up.host);
    assert_ne!(bed.answer("GET", &path, &[], b"").status, 200);

    bed.stop_hub();
    let password = bed.path("password");
    std::fs::write(&password, "hub-password\n").unwrap();
    let own = format!(
        "username = \"hub\"\npassword_file = \"{}\"\n",
        password.display()
    );
    bed.configure_more(&own);
    bed.start_hub();
    admit(&up, &[HUB]);
    put(&bed, "login", &login(&up.host, APP));
    bed.apply("second", &private("second", &image, "[login]"));
    assert_eq!(bed.answer("GET", &path, &[], b"").status, 200);
}

#[test]
fn a_secret_of_logins_is_one_before_it_is_used_and_stays_one() {
    let bed = Bed::start(Kind::Embedded);
    let image = bed.import("v1");
    let app = private("web", &image, "[login]");
    for (value, said) in [
        (&b"app-password"[..], "line 1"),
        (b"{}", "no login"),
        (br#"{"auths": {}, "credsStore": "hunter2"}"#, "credsStore"),
        (
            br#"{"credHelpers": {"ghcr.io": "hunter2"}, "auths": {"a.b": {"auth": "YTpi"}}}"#,
            "credHelpers",
        ),
        (
            br#"{"auths": {"a.b/hunter2": {"auth": "YTpi"}}}"#,
            "login 1",
        ),
        (
            br#"{"auths": {"a.b": {"identitytoken": "hunter 2"}}}"#,
            "a token with spaces",
        ),
        (b"\xff\xfe", "line 1"),
    ] {
        put(&bed, "login", value);
        assert_eq!(refused(&bed, "web", &app), "secret-not-docker-config");
        let (_, body) = bed.call("PUT", "/apps/web", app.as_bytes());
        let detail = body["detail"].as_str().unwrap();
        assert!(
            detail.contains(said) && detail.contains("secret login"),
            "{detail}"
        );
    }
    put(&bed, "login", &login("a.b", APP));
    bed.apply("web", &app);
    // From now on it cannot become anything else.
    let (status, body) = bed.call("PUT", "/secrets/login", b"app-password");
    assert_eq!(
        (status, &body["code"]),
        (422, &json!("secret-not-docker-config"))
    );
    assert!(!body.to_string().contains("app-password"), "{body}");
    assert_eq!(bed.get("/secrets/login")["revision"], 8);
    put(&bed, "login", &login("a.b", HUB));
    assert_ne!(bed.get("/secrets/login")["revision"], Value::Null);
}
