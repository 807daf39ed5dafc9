//! Any fleet, any images: what a preview says is counted again here, device by device and in the plainest way.

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

fn digest(number: u8) -> Digest {
    Digest::of(&[number])
}

fn layer(number: u8) -> LayerAhead {
    LayerAhead {
        digest: Digest::of(&[number, 1]),
        diff_id: digest(number),
        bytes: (u64::from(number) + 1) << 15,
        unpacked_bytes: (u64::from(number) + 1) << 17,
    }
}

fn inventory(arch: &str) -> Inventory {
    Inventory {
        agent_version: "1".to_owned(),
        arch: arch.to_owned(),
        kernel: "6".to_owned(),
        memory_bytes: 1 << 30,
        disk_bytes: 1 << 34,
        disk_free_bytes: 1 << 33,
        labels: BTreeMap::new(),
        disk_reserve_bytes: Some(1 << 28),
        metered: Some(false),
        dev_nodes: Some(Vec::new()),
    }
}

fn device(number: usize) -> Device {
    Device {
        id: format!("gw-{number:05}").parse().unwrap(),
        online: true,
        held: None,
        inventory: Some(inventory("arm64")),
        on_disk: BTreeSet::new(),
        running: None,
        at_release: false,
        others_memory_bytes: Some(0),
        has_key: true,
        has_budget: true,
    }
}

fn wants() -> Wants {
    Wants {
        images: ["a".to_owned(), "b".to_owned()].into(),
        memory_bytes: 128 << 20,
        ..Wants::default()
    }
}

fn known(images: &[(&str, &[u8])]) -> Known {
    let image = |(name, layers): &(&str, &[u8])| {
        let layers = layers.iter().map(|number| layer(*number)).collect();
        let deltas = Vec::new();
        let key = ((*name).to_owned(), "linux/arm64".to_owned());
        (key, Image::Known { layers, deltas })
    };
    Known {
        images: images.iter().map(image).collect(),
        releases: [(digest(200), ["old".to_owned()].into())].into(),
    }
}

fn preview(wants: &Wants, known: &Known, devices: &[Device]) -> Preview {
    let mut draft = Draft::new(wants, known);
    devices.iter().for_each(|device| draft.add(device));
    draft.finish(&[])
}

fn codes(preview: &Preview) -> Vec<ObstacleCode> {
    preview.obstacles.iter().map(|found| found.code).collect()
}

#[test]
fn shared_layers_are_not_counted_and_each_blob_is_counted_once() {
    let known = known(&[("a", &[0, 1, 1]), ("b", &[1, 2]), ("old", &[0])]);
    let fresh = device(0);
    let updated = Device {
        on_disk: [digest(200)].into(),
        running: Some(digest(200)),
        ..device(1)
    };
    let found = preview(&wants(), &known, &[fresh, updated]);
    let bytes = |numbers: &[u8]| numbers.iter().map(|n| layer(*n).bytes).sum::<u64>();
    let each: Vec<_> = found.download.groups.iter().map(|g| g.bytes).collect();
    assert_eq!(each, [Some(bytes(&[0, 1, 2])), Some(bytes(&[1, 2]))]);
    assert_eq!(found.download.total_bytes, bytes(&[0, 1, 2, 1, 2]));
    assert_eq!(found.download.most_bytes, bytes(&[0, 1, 2]));
    assert_eq!(codes(&found), []);
    // The second image unpacks beside the first, and all of its layers are on their way at once.
    let unpacked = |numbers: &[u8]| {
        numbers
            .iter()
            .map(|n| layer(*n).unpacked_bytes)
            .sum::<u64>()
    };
    let disk = unpacked(&[0, 1]) + unpacked(&[2]) + bytes(&[2]);
    assert_eq!(found.download.groups[0].disk_bytes, Some(disk));
}

#[test]
fn deltas_count_where_what_they_lean_on_is_there() {
    let mut known = known(&[("a", &[4, 5]), ("b", &[4]), ("old", &[0])]);
    let delta = |of: u8, on: u8, bytes| DeltaLayer {
        diff_id: digest(of),
        leans_on: vec![digest(on)],
        bytes,
    };
    let key = ("a".to_owned(), "linux/arm64".to_owned());
    let Some(Image::Known { deltas, .. }) = known.images.get_mut(&key) else {
        panic!("it is known");
    };
    *deltas = vec![
        vec![delta(4, 0, 100), delta(5, 9, 1)],
        vec![delta(5, 0, u64::MAX)],
    ];
    let has = |release| Device {
        on_disk: [digest(release)].into(),
        ..device(usize::from(release))
    };
    let found = preview(&wants(), &known, &[has(200), has(201)]);
    let whole = layer(4).bytes + layer(5).bytes;
    let groups: Vec<_> = found
        .download
        .groups
        .iter()
        .map(|group| (group.bytes, group.delta_bytes, group.incomplete))
        .collect();
    let with = Some(layer(5).bytes + 100);
    assert!(groups.contains(&(Some(whole), with, false)), "{groups:?}");
    assert!(groups.contains(&(Some(whole), None, true)), "{groups:?}");
}

#[test]
fn each_obstacle_has_its_code_and_only_where_it_is_one() {
    let known = known(&[("a", &[0]), ("b", &[1])]);
    let wants = Wants {
        nodes: ["/dev/ttyUSB0".to_owned()].into(),
        secrets: true,
        budgets: true,
        ..wants()
    };
    let well = || {
        let mut device = device(0);
        let inventory = device.inventory.as_mut().unwrap();
        inventory.dev_nodes = Some(vec!["/dev/ttyUSB0".to_owned()]);
        device
    };
    let told = |change: &dyn Fn(&mut Device)| {
        let mut device = well();
        change(&mut device);
        codes(&preview(&wants, &known, &[device]))
    };
    let inventory = |change: fn(&mut Inventory)| {
        told(&|device: &mut Device| change(device.inventory.as_mut().unwrap()))
    };
    assert_eq!(told(&|_| ()), []);
    for (found, expected) in [
        (told(&|d| d.online = false), ObstacleCode::Offline),
        (told(&|d| d.held = Some(String::new())), ObstacleCode::Held),
        (
            told(&|d| d.has_key = false),
            ObstacleCode::SecretsKeyMissing,
        ),
        (
            told(&|d| d.has_budget = false),
            ObstacleCode::NoDisruptionBudget,
        ),
        (
            told(&|d| d.others_memory_bytes = Some(1 << 30)),
            ObstacleCode::MemoryShort,
        ),
        (
            told(&|d| d.others_memory_bytes = None),
            ObstacleCode::FactsUnknown,
        ),
        (
            inventory(|i| i.memory_bytes = 0),
            ObstacleCode::FactsUnknown,
        ),
        (inventory(|i| i.disk_bytes = 0), ObstacleCode::FactsUnknown),
        (
            inventory(|i| i.disk_reserve_bytes = None),
            ObstacleCode::FactsUnknown,
        ),
        (inventory(|i| i.metered = None), ObstacleCode::FactsUnknown),
        (
            inventory(|i| i.dev_nodes = None),
            ObstacleCode::FactsUnknown,
        ),
        (inventory(|i| i.metered = Some(true)), ObstacleCode::Metered),
        (
            inventory(|i| i.disk_free_bytes = 1 << 28),
            ObstacleCode::DiskShort,
        ),
        (
            inventory(|i| i.dev_nodes = Some(Vec::new())),
            ObstacleCode::DeviceMissing,
        ),
    ] {
        assert_eq!(found, [expected]);
    }
    assert_eq!(
        told(&|device| device.inventory = None),
        [ObstacleCode::FactsUnknown, ObstacleCode::DownloadUnknown]
    );
    assert_eq!(
        inventory(|inventory| inventory.arch = "riscv64".to_owned()),
        [ObstacleCode::DownloadUnknown]
    );
    // Who has the release is asked for nothing.
    assert_eq!(
        told(&|device| {
            device.at_release = true;
            device.online = false;
        }),
        []
    );
}

#[test]
fn old_containers_that_are_kept_need_memory_beside_the_new_ones() {
    let text = format!(
        "{{\"schema\": 1, \"app\": \"shop\", \"services\": {{
            \"db\": {{\"image\": \"hub.internal/db@{0}\", \"mem_limit\": \"512m\"}},
            \"web\": {{\"image\": \"hub.internal/web@{0}\", \"mem_limit\": \"384m\",
                \"deploy\": {{\"update_config\": {{\"order\": \"start-first\", \"keep_old\": \"1h\"}}}}}}}}}}",
        digest(7)
    );
    let release: Release = serde_json::from_str(&text).unwrap();
    let wants = Wants {
        images: wants().images,
        ..Wants::of(&release, false)
    };
    assert_eq!(
        (wants.memory_bytes, wants.kept_bytes),
        (896 << 20, 384 << 20)
    );
    let known = known(&[("a", &[0]), ("b", &[1])]);
    // One GiB is enough for a device that has nothing of the app yet.
    let updated = Device {
        running: Some(digest(200)),
        ..device(1)
    };
    let found = preview(&wants, &known, &[device(0), updated]);
    assert_eq!(codes(&found), [ObstacleCode::MemoryShort]);
    let named = &found.obstacles[0].named;
    assert_eq!(named.len(), 1);
    assert_eq!(named[0].device.as_str(), "gw-00001");
    let detail = named[0].detail.as_deref().unwrap_or_default();
    assert_eq!(
        detail,
        "1342177280 bytes of 1073741824, 402653184 of them for old containers (keep_old)"
    );
}

#[test]
fn what_runs_nowhere_is_told_with_its_image_and_what_cannot_be_told_is_not_guessed() {
    let mut known = known(&[("a", &[0]), ("b", &[1])]);
    let key = |name: &str, platform: &str| (name.to_owned(), platform.to_owned());
    known
        .images
        .insert(key("b", "linux/arm64"), Image::NoPlatform);
    let found = preview(&wants(), &known, &[device(0)]);
    assert_eq!(codes(&found), [ObstacleCode::NoMatchingPlatform]);
    let detail = found.obstacles[0].named[0].detail.as_deref();
    assert_eq!(detail, Some("b for linux/arm64"));
    assert_eq!(found.download.unknown_devices, 0);
    // A node that no inventory names may be there.
    let wants = Wants {
        images: BTreeSet::new(),
        nodes: ["/dev/loop0".to_owned()].into(),
        ..wants()
    };
    let found = preview(&wants, &known, &[device(0)]);
    assert_eq!(codes(&found), [ObstacleCode::FactsUnknown]);
}

#[test]
fn unset_secrets_concern_everybody_and_come_first() {
    let (wants, known) = (wants(), known(&[("a", &[0]), ("b", &[1])]));
    let mut draft = Draft::new(&wants, &known);
    for number in 0..3 {
        draft.add(&Device {
            online: number != 0,
            ..device(number)
        });
    }
    let found = draft.finish(&["token".to_owned()]);
    assert_eq!(
        codes(&found),
        [ObstacleCode::SecretNotSet, ObstacleCode::Offline]
    );
    assert_eq!(found.obstacles[0].devices, 3);
    assert!(found.obstacles[0].message.ends_with(": token"));
}

#[test]
fn a_hundred_thousand_devices_fit_into_a_small_answer() {
    let (wants, known) = (wants(), known(&[("a", &[0]), ("b", &[1]), ("old", &[0])]));
    let mut draft = Draft::new(&wants, &known);
    for number in 0..100_000_usize {
        draft.add(&Device {
            online: number % 2 == 0,
            // Every tenth is like no other.
            on_disk: if number % 10 == 0 {
                [Digest::of(&number.to_be_bytes())].into()
            } else {
                [digest(200)].into()
            },
            ..device(number)
        });
    }
    let found = draft.finish(&[]);
    assert_eq!(found.devices, 100_000);
    assert_eq!(found.download.groups.len(), MAX_DOWNLOAD_GROUPS);
    assert_eq!(found.download.groups[0].devices, 90_000);
    assert_eq!(found.download.known_devices, 100_000);
    let offline = &found.obstacles[0];
    assert_eq!(
        (offline.code, offline.devices),
        (ObstacleCode::Offline, 50_000)
    );
    assert_eq!(offline.named.len(), MAX_NAMED_DEVICES);
    assert_eq!(offline.more, 50_000 - 100);
    assert!(serde_json::to_vec(&found).unwrap().len() < 64 << 10);
}

#[derive(Debug, Clone)]
struct World {
    known: Known,
    wants: Wants,
    devices: Vec<Device>,
}

fn image() -> impl Strategy<Value = Image> {
    let layers = prop::collection::vec(0_u8..12, 0..6);
    let delta = (0_u8..12, 0_u8..12, 0_u64..1 << 20).prop_map(|(of, on, bytes)| DeltaLayer {
        diff_id: digest(of),
        leans_on: vec![digest(on)],
        bytes,
    });
    let deltas = prop::collection::vec(prop::collection::vec(delta, 0..3), 0..6);
    prop_oneof![
        6 => (layers, deltas).prop_map(|(layers, deltas)| Image::Known {
            layers: layers.into_iter().map(layer).collect(),
            deltas,
        }),
        1 => Just(Image::NoPlatform),
        1 => Just(Image::Unknown),
    ]
}

fn world() -> impl Strategy<Value = World> {
    let names = || select(vec!["a", "b", "c", "d", "e"]).prop_map(str::to_owned);
    let arch = || select(vec!["amd64", "arm64", "arm/v7"]);
    let key = (names(), arch()).prop_map(|(name, arch)| (name, format!("linux/{arch}")));
    let images = prop::collection::btree_map(key, image(), 0..15);
    let releases = prop::collection::btree_map(
        (100_u8..104).prop_map(digest),
        prop::collection::btree_set(names(), 0..3),
        0..4,
    );
    let known = (images, releases).prop_map(|(images, releases)| Known { images, releases });
    let said = (
        any::<[bool; 4]>(),
        prop::option::of(arch()),
        prop::collection::btree_set((100_u8..105).prop_map(digest), 0..3),
        prop::option::of(0_u64..2 << 30),
        0_u64..4 << 20,
    );
    let devices = prop::collection::vec(said, 0..30).prop_map(|devices| {
        let devices = devices.into_iter().enumerate();
        devices
            .map(
                |(
                    number,
                    ([online, at_release, has_key, metered], arch, on_disk, others, free),
                )| {
                    let inventory = arch.map(|arch| Inventory {
                        disk_free_bytes: free,
                        disk_reserve_bytes: Some(1 << 20),
                        metered: Some(metered),
                        ..inventory(arch)
                    });
                    Device {
                        online,
                        at_release,
                        has_key,
                        inventory,
                        running: on_disk.first().copied(),
                        on_disk,
                        others_memory_bytes: others,
                        ..device(number)
                    }
                },
            )
            .collect()
    });
    (known, prop::collection::btree_set(names(), 1..4), devices).prop_map(
        |(known, images, devices)| World {
            known,
            wants: Wants { images, ..wants() },
            devices,
        },
    )
}

/// Layers of all that a device has, and then image by image what it lacks: counted with lists and no memory.
fn plainly(world: &World, device: &Device) -> Option<u64> {
    let platform = format!("linux/{}", device.inventory.as_ref()?.arch);
    let image = |name: &String| world.known.images.get(&(name.clone(), platform.clone()));
    let mut here = Vec::new();
    for release in &device.on_disk {
        for name in world.known.releases.get(release).into_iter().flatten() {
            if let Some(Image::Known { layers, .. }) = image(name) {
                here.extend(layers.iter().map(|layer| layer.diff_id));
            }
        }
    }
    let mut bytes = 0;
    for name in &world.wants.images {
        let Some(Image::Known { layers, .. }) = image(name) else {
            return None;
        };
        for layer in layers {
            if !here.contains(&layer.diff_id) {
                here.push(layer.diff_id);
                bytes += layer.bytes;
            }
        }
    }
    Some(bytes)
}

proptest! {
    #[test]
    fn sums_and_groups_are_those_of_each_device_alone(world in world()) {
        let found = preview(&world.wants, &world.known, &world.devices);
        let rest: Vec<&Device> = world.devices.iter().filter(|d| !d.at_release).collect();
        let each: Vec<u64> = rest.iter().filter_map(|device| plainly(&world, device)).collect();
        let download = &found.download;
        prop_assert_eq!(found.devices, world.devices.len() as u64);
        prop_assert_eq!(found.at_release, (world.devices.len() - rest.len()) as u64);
        prop_assert_eq!(download.known_devices, each.len() as u64);
        prop_assert_eq!(download.total_bytes, each.iter().sum::<u64>());
        prop_assert_eq!(download.most_bytes, each.iter().copied().max().unwrap_or(0));
        prop_assert!(download.total_delta_bytes <= download.total_bytes);
        let grouped: u64 = download.groups.iter().map(|group| group.devices).sum();
        prop_assert_eq!(grouped, rest.len() as u64);
        let weighed: u64 = download.groups.iter().map(|g| g.devices * g.bytes.unwrap_or(0)).sum();
        prop_assert_eq!(weighed, download.total_bytes);
    }

    #[test]
    fn the_order_of_devices_changes_no_count(world in world()) {
        let forth = preview(&world.wants, &world.known, &world.devices);
        let back: Vec<Device> = world.devices.iter().rev().cloned().collect();
        let back = preview(&world.wants, &world.known, &back);
        prop_assert_eq!(&forth.download, &back.download);
        let counts = |found: &Preview| -> Vec<_> {
            found.obstacles.iter().map(|o| (o.code, o.devices, o.more)).collect()
        };
        prop_assert_eq!(counts(&forth), counts(&back));
    }

    #[test]
    fn to_have_more_never_means_to_fetch_more(world in world(), number in 100_u8..104) {
        let more: Vec<Device> = world.devices.iter().cloned().map(|mut device| {
            device.on_disk.insert(digest(number));
            device
        }).collect();
        let less = preview(&world.wants, &world.known, &world.devices);
        let more = preview(&world.wants, &world.known, &more);
        prop_assert!(more.download.total_bytes <= less.download.total_bytes);
    }
}
