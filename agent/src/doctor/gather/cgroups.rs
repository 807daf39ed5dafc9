//! How cgroups are mounted and what is delegated to the configured parent.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::files::Tree;
use crate::doctor::facts::{Cgroups, Layout, Listed, Mount, Place, V1Mount, parse_mounts};

/// Where the agent expects them (file-hierarchy(7)).
const MOUNT: &str = "/sys/fs/cgroup";

/// Children of a cgroup that are looked at for a file that a root cgroup lacks.
const CHILDREN_MAX: usize = 64;

pub(super) fn cgroups(tree: &Tree, parent: &str) -> Cgroups {
    let mounts = parse_mounts(&tree.mounts());
    let layout = layout(&mounts);
    let unified = mounts.iter().rev().find(|mount| mount.kind == "cgroup2");
    let (chain, cpu_quota, swap_limit, io_limit) = match &layout {
        Layout::Unified { .. } => {
            let chain = chain(tree, parent);
            (
                chain,
                below_root(tree, "cpu.max"),
                below_root(tree, "memory.swap.max"),
                below_root(tree, "io.max"),
            )
        }
        Layout::Split { controllers, .. } => {
            let has = |controller: &str, file: &str| {
                let mount = controllers.get(controller)?;
                Some(tree.exists(below(&mount.point).join(file)))
            };
            (
                Vec::new(),
                has("cpu", "cpu.cfs_quota_us"),
                has("memory", "memory.memsw.limit_in_bytes"),
                has("blkio", "blkio.throttle.read_bps_device"),
            )
        }
        Layout::Missing { .. } => (Vec::new(), None, None, None),
    };
    Cgroups {
        parent: parent.to_owned(),
        layout,
        listed: listed(&tree.text("proc/cgroups").unwrap_or_default()),
        unified_controllers: unified
            .map(|mount| words(tree, &below(&mount.point).join("cgroup.controllers")))
            .unwrap_or_default(),
        chain,
        cpu_quota,
        swap_limit,
        io_limit,
    }
}

/// An absolute path as a tree takes it.
fn below(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn layout(mounts: &[Mount]) -> Layout {
    let at = |mount: &&Mount| mount.point == Path::new(MOUNT);
    // The last one on the place hides the others.
    if let Some(mount) = mounts
        .iter()
        .rev()
        .find(at)
        .filter(|mount| mount.kind == "cgroup2")
    {
        return Layout::Unified {
            read_only: mount.has("ro"),
        };
    }
    let mut controllers = BTreeMap::new();
    for mount in mounts {
        if mount.kind != "cgroup" || !mount.point.starts_with(MOUNT) {
            continue;
        }
        for option in &mount.options {
            // What is no controller is never asked for.
            controllers.insert(
                option.clone(),
                V1Mount {
                    point: mount.point.clone(),
                    read_only: mount.has("ro"),
                },
            );
        }
    }
    let unified = mounts.iter().find(|mount| mount.kind == "cgroup2");
    if controllers.is_empty() {
        let elsewhere = unified.map(|mount| mount.point.clone());
        return Layout::Missing { elsewhere };
    }
    Layout::Split {
        controllers,
        hybrid: unified.is_some(),
    }
}

/// `/proc/cgroups` (cgroups(7)): name, hierarchy, number of cgroups, enabled.
fn listed(text: &str) -> BTreeMap<String, Listed> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let name = fields.next()?.to_owned();
            let hierarchy = fields.next()?.parse().ok()?;
            let enabled = fields.nth(1)? != "0";
            Some((name, Listed { hierarchy, enabled }))
        })
        .collect()
}

/// From the root to the parent, as far as it exists.
fn chain(tree: &Tree, parent: &str) -> Vec<Place> {
    let mut at = below(Path::new(MOUNT)).to_owned();
    let mut path = String::new();
    let mut chain = Vec::new();
    for part in std::iter::once("").chain(parent.trim_matches('/').split('/')) {
        if !part.is_empty() {
            at.push(part);
            if !path.is_empty() {
                path.push('/');
            }
            path.push_str(part);
        }
        if !tree.exists(at.join("cgroup.controllers")) {
            break;
        }
        let processes = tree.text(at.join("cgroup.procs")).unwrap_or_default();
        chain.push(Place {
            path: path.clone(),
            controllers: words(tree, &at.join("cgroup.controllers")),
            enabled: words(tree, &at.join("cgroup.subtree_control")),
            processes: !processes.trim().is_empty(),
            // Only the machine's own root has no type (kernel documentation, "Control Group v2").
            machine_root: part.is_empty() && !tree.exists(at.join("cgroup.type")),
        });
    }
    chain
}

fn words(tree: &Tree, path: &Path) -> BTreeSet<String> {
    let text = tree.text(path).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// Whether cgroups below the root have a file that the root itself never has; `None` when there are none whose
/// controller is on.
fn below_root(tree: &Tree, file: &str) -> Option<bool> {
    let root = below(Path::new(MOUNT));
    let controller = file.split('.').next().unwrap_or(file);
    if !words(tree, &root.join("cgroup.subtree_control")).contains(controller) {
        return None;
    }
    let children = tree.names(root).into_iter().take(CHILDREN_MAX * 4);
    let children = children.filter(|name| tree.exists(root.join(name).join("cgroup.controllers")));
    children
        .take(CHILDREN_MAX)
        .map(|name| tree.exists(root.join(name).join(file)))
        .reduce(|any, one| any || one)
}
