//! Configs: files whose text is in the release, in real containers.

use e2e::fleet::{Fleet, Identity, LONG, await_container, http_get, import};
use e2e::image::Builder;
use e2e::{Bed, Hub, wait_for};

/// An app whose `server` serves a config and is not ready while that says `bad`; `other` has no config.
fn manifest(image: &str, text: &str) -> String {
    format!(
        "apiVersion: foreshore/v1
kind: App
metadata: {{name: shop}}
spec:
  selector: {{matchLabels: {{role: web}}}}
  configs: {{settings: {{content: '{text}'}}}}
  services:
    server:
      image: {image}
      mem_limit: 32m
      stop_grace_period: 1s
      configs: [{{source: settings, target: /www/settings, mode: 0440}}]
      probes: {{readiness: {{exec: {{command: [/bin/sh, -c, 'test $(cat /www/settings) != bad']}}, period: 200ms}}}}
    other:
      image: {image}
      mem_limit: 32m
      stop_grace_period: 1s
  rollout: {{waves: [{{percent: 100}}], soak: 1s, bake: 0s, progressDeadline: 15s, maxUnavailable: 100%}}
"
    )
}

fn await_text(bed: &Bed, text: &str) -> Identity {
    wait_for(&format!("the config {text:?}"), LONG, || {
        let server = await_container(bed, "device-1", "shop", "server");
        match http_get(server, "/settings") {
            Ok(found) if found == text => Ok(server),
            other => Err(other),
        }
    })
}

#[test]
fn a_changed_config_replaces_only_who_has_it_and_a_rollback_brings_the_old_text_back() {
    let bed = Bed::new("configs");
    let builder = Builder::new(&bed);
    builder.web("v1", "one", true);
    let fleet = Fleet::start(&bed, Hub::start(&bed), 1);
    let api = fleet.api();
    let image = import(&api, &builder, "v1");
    let apply = |text: &str| api.apply("shop", &manifest(&image, text)).ok()["release"].clone();

    let first = apply("one");
    fleet.await_rollout("shop", "completed");
    let server = await_text(&bed, "one");
    let other = await_container(&bed, "device-1", "shop", "other");

    let second = apply("two");
    assert_ne!(second, first);
    fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &second);
    let replaced = await_text(&bed, "two");
    assert_ne!(replaced, server);
    assert_eq!(await_container(&bed, "device-1", "shop", "other"), other);

    // The device itself goes back.
    assert_ne!(apply("bad"), second);
    fleet.await_rollout("shop", "rolled-back");
    fleet.await_release("shop", &second);
    let back = await_text(&bed, "two");
    assert_ne!(back, replaced);
    // And so does an operator.
    assert_eq!(
        api.send("POST", "/apps/shop/undo", b"").ok()["release"],
        first
    );
    fleet.await_rollout("shop", "completed");
    fleet.await_release("shop", &first);
    assert_ne!(await_text(&bed, "one"), back);
    assert_eq!(await_container(&bed, "device-1", "shop", "other"), other);
}
