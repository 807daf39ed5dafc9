//! Releases whose images lack a signature that the device's policy wants, and those in whose images rot was found.

use super::*;

fn image_of(release: &Release) -> BTreeSet<Digest> {
    let images = release.services.values().map(|service| &service.image);
    images
        .filter_map(|image| image.rsplit_once('@')?.1.parse().ok())
        .collect()
}

#[test]
fn a_release_with_an_unsigned_image_is_not_tried_and_says_so() {
    let mut world = settled(&web("good", 1));
    let before = world.running("shop");
    let next = web("good", 2);
    // Also one that is on disk, for another app.
    world.images.extend(image_of(&next));
    world.unsigned.insert(next.digest(), image_of(&next));
    world.registry = Some(ReasonCode::ImageUnsigned);
    let digest = world.assign(&next);
    world.run(24 * HOUR);
    let status = world.status("shop");
    assert_eq!(status.phase, Phase::Blocked);
    assert_eq!(status.reason.unwrap().code, ReasonCode::ImageUnsigned);
    assert_eq!(world.running("shop"), before);
    // It is signed after all.
    world.registry = None;
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    assert_eq!(world.status("shop").running, Some(digest));
}

#[test]
fn what_runs_and_what_is_gone_back_to_is_not_asked_for_a_signature_again() {
    let good = web("good", 1);
    let mut world = settled(&good);
    world.unsigned.insert(good.digest(), image_of(&good));
    world.registry = Some(ReasonCode::ImageUnsigned);
    world.reboot();
    world.run(HOUR);
    assert_eq!(world.running("shop").len(), 1);
    world.registry = None;
    world.assign(&web("never-ready", 2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(world.status("shop").running, Some(good.digest()));
    assert_eq!(world.running("shop").len(), 1);
}

#[test]
fn an_image_in_which_rot_was_found_is_staged_again_and_run_meanwhile() {
    let good = web("good", 1);
    let mut world = settled(&good);
    let before = world.running("shop");
    world.damaged = image_of(&good);
    world.run(HOUR);
    assert!(world.damaged.is_empty(), "it was staged again");
    assert_eq!(world.running("shop"), before, "and nothing was restarted");
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    // Without a registry it is started from what there is, also to go back to.
    world.damaged = image_of(&good);
    world.registry = Some(ReasonCode::RegistryUnreachable);
    world.reboot();
    world.run(HOUR);
    assert_eq!(world.running("shop").len(), 1);
    assert_eq!(world.phase("shop"), Phase::Succeeded);
    world.registry = None;
    world.assign(&web("never-ready", 2));
    world.run(HOUR);
    assert_eq!(world.phase("shop"), Phase::RolledBack);
    assert_eq!(world.status("shop").running, Some(good.digest()));
    assert!(world.damaged.is_empty());
}
