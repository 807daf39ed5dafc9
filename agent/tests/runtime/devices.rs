//! Which devices a container may open, whatever device nodes it gets hold of.

use foreshore_agent::runtime::Runtime as _;
use foreshore_agent::runtime::oci::UserNamespaces;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::json;

use crate::bed::{Bed, LONG, pid_of};

#[tokio::test]
async fn devices_off_the_list_cannot_be_opened_even_with_a_node() {
    let bed = Bed::new();
    // In a user namespace no node that is made in the container opens at all.
    let runtime = bed.runtime_in(UserNamespaces::Off);
    let spec = bed.shell("sleep 1000", json!({"tmpfs": ["/out"]}));
    runtime.start(&spec).await.unwrap();
    let root = format!("/proc/{}/root", pid_of(&runtime, &spec.id).await);
    // Numbers that are kept for experiments (Linux `admin-guide/devices.txt`): where opening is allowed, no driver
    // answers, and the error is another one. Nodes that open show that nodes of this kind work here.
    for (name, kind, major, minor, opens) in [
        ("c", SFlag::S_IFCHR, 60, 77, false),
        ("b", SFlag::S_IFBLK, 60, 77, false),
        ("mem", SFlag::S_IFCHR, 1, 1, false),
        ("kmsg", SFlag::S_IFCHR, 1, 11, false),
        ("block-of-null", SFlag::S_IFBLK, 1, 3, false),
        ("null2", SFlag::S_IFCHR, 1, 3, true),
        ("zero2", SFlag::S_IFCHR, 1, 5, true),
        ("random2", SFlag::S_IFCHR, 1, 8, true),
        ("urandom2", SFlag::S_IFCHR, 1, 9, true),
        ("ptmx2", SFlag::S_IFCHR, 5, 2, true),
    ] {
        let node = format!("{root}/dev/{name}");
        let everyone = Mode::from_bits_truncate(0o666);
        mknod(node.as_str(), kind, everyone, makedev(major, minor)).unwrap();
        let line = format!("exec 2>/out/error; head -c 1 /dev/{name} > /out/content");
        let command = ["sh", "-c", line.as_str()].map(str::to_owned);
        // A pseudo terminal that opens has nothing to read, so opening for writing must do.
        let command = if name == "ptmx2" {
            ["sh", "-c", "exec 2>/out/error; : > /dev/ptmx2"].map(str::to_owned)
        } else {
            command
        };
        let code = runtime.exec(&spec.id, &command, LONG).await.unwrap();
        let error = std::fs::read_to_string(format!("{root}/out/error")).unwrap();
        if opens {
            assert_eq!((code, error.as_str()), (0, ""), "{name}");
        } else {
            assert!(
                error.contains("Operation not permitted"),
                "{name}: {code} {error}"
            );
        }
    }
    // A pseudo terminal of its own: the device number is only known when it is there.
    let line = "exec 2>/out/error 3<>/dev/ptmx && test -c /dev/pts/0";
    let command = ["sh", "-c", line].map(str::to_owned);
    let code = runtime.exec(&spec.id, &command, LONG).await.unwrap();
    let error = std::fs::read_to_string(format!("{root}/out/error")).unwrap();
    assert_eq!((code, error.as_str()), (0, ""));
    runtime.remove(&spec.id).await.unwrap();
    bed.assert_clean();
}
