//! Device control on cgroup v2: a BPF program on the container's cgroup that the kernel asks at every opening and
//! making of a device node (Linux `Documentation/admin-guide/cgroup-v2.rst`, "Device controller").
//!
//! libcontainer can do this only with libbpf, a C library, and does nothing at all without it. The program is small
//! enough to be assembled here. Its rules are the ones of the OCI configuration, so that cgroup v1, where
//! libcontainer applies them, and v2 allow the same.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use serde_json::Value;

/// `BPF_DEVCG_ACC_*` of `linux/bpf.h`.
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// One kind of device that may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rule {
    kind: Kind,
    /// Missing means every number.
    major: Option<i32>,
    /// Missing means every number.
    minor: Option<i32>,
    /// Which of [`ALL`] are allowed.
    access: i32,
}

/// `BPF_DEVCG_DEV_*` of `linux/bpf.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Character = 2,
}

/// The rules of an OCI configuration that cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "device rule {0} is not one of those that can be applied: first one that denies all, then ones that allow some"
)]
pub(crate) struct RuleError(String);

/// Reads `linux.resources.devices` of an OCI configuration: the first rule denies everything, the others allow.
///
/// # Errors
///
/// For any other list. Nothing is allowed by leaving a rule out.
pub(crate) fn rules(configuration: &Value) -> Result<Vec<Rule>, RuleError> {
    let list = &configuration["linux"]["resources"]["devices"];
    let wrong = |rule: &Value| RuleError(rule.to_string());
    let (first, others) = list
        .as_array()
        .and_then(|list| list.split_first())
        .ok_or_else(|| wrong(list))?;
    let all = |key: &str| {
        matches!(first[key].as_str(), None | Some("a")) && first[key].as_i64().is_none()
    };
    let denies_all = first["allow"] == false
        && all("type")
        && all("major")
        && all("minor")
        && matches!(first["access"].as_str(), None | Some("rwm"));
    if !denies_all {
        return Err(wrong(first));
    }
    others
        .iter()
        .map(|rule| allowing(rule).ok_or_else(|| wrong(rule)))
        .collect()
}

fn allowing(rule: &Value) -> Option<Rule> {
    if rule["allow"] != true {
        return None;
    }
    let kind = match rule["type"].as_str()? {
        "b" => Kind::Block,
        "c" => Kind::Character,
        _ => return None,
    };
    let number = |key: &str| match &rule[key] {
        Value::Null => Some(None),
        value => Some(Some(
            i32::try_from(value.as_i64()?)
                .ok()
                .filter(|number| *number >= 0)?,
        )),
    };
    let mut access = 0;
    for letter in rule["access"].as_str()?.chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return None,
        };
    }
    Some(Rule {
        kind,
        major: number("major")?,
        minor: number("minor")?,
        access,
    })
}

/// `struct bpf_insn` of `linux/bpf.h`, with both registers in one byte.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Instruction codes (Linux `Documentation/bpf/standardization/instruction-set.rst`): 32-bit arithmetic, which
/// clears the upper half, and 64-bit jumps.
mod code {
    pub(super) const LOAD_WORD: u8 = 0x61;
    pub(super) const MOVE_REGISTER: u8 = 0xbc;
    pub(super) const MOVE: u8 = 0xb4;
    pub(super) const AND: u8 = 0x54;
    pub(super) const SHIFT_RIGHT: u8 = 0x74;
    pub(super) const JUMP_IF_NOT: u8 = 0x55;
    pub(super) const EXIT: u8 = 0x95;
}

/// The result, and a place to compute in.
const RESULT: u8 = 0;
/// The argument: `struct bpf_cgroup_dev_ctx`, three words: access and type, major, minor.
const CONTEXT: u8 = 1;
const ACCESS: u8 = 2;
const MAJOR: u8 = 3;
const MINOR: u8 = 4;
const TYPE: u8 = 5;

const fn instruction(code: u8, to: u8, from: u8, immediate: i32) -> Instruction {
    // The first register is in the low half where the first byte of a number is its low one.
    let registers = if cfg!(target_endian = "little") {
        from << 4 | to
    } else {
        to << 4 | from
    };
    Instruction {
        code,
        registers,
        offset: 0,
        immediate,
    }
}

const fn load(to: u8, offset: i16) -> Instruction {
    Instruction {
        offset,
        ..instruction(code::LOAD_WORD, to, CONTEXT, 0)
    }
}

/// A program that answers 1 when some rule allows all that is asked for, else 0.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        load(ACCESS, 0),
        load(MAJOR, 4),
        load(MINOR, 8),
        instruction(code::MOVE_REGISTER, TYPE, ACCESS, 0),
        instruction(code::AND, TYPE, 0, 0xffff),
        instruction(code::SHIFT_RIGHT, ACCESS, 0, 16),
    ];
    for rule in rules {
        let mut tests = vec![instruction(code::JUMP_IF_NOT, TYPE, 0, rule.kind as i32)];
        if let Some(major) = rule.major {
            tests.push(instruction(code::JUMP_IF_NOT, MAJOR, 0, major));
        }
        if let Some(minor) = rule.minor {
            tests.push(instruction(code::JUMP_IF_NOT, MINOR, 0, minor));
        }
        tests.extend([
            instruction(code::MOVE_REGISTER, RESULT, ACCESS, 0),
            instruction(code::AND, RESULT, 0, ALL & !rule.access),
            instruction(code::JUMP_IF_NOT, RESULT, 0, 0),
        ]);
        let allow = [
            instruction(code::MOVE, RESULT, 0, 1),
            instruction(code::EXIT, 0, 0, 0),
        ];
        // A failed test goes on with the next rule.
        for (left, test) in (allow.len()..allow.len() + tests.len()).zip(tests.iter_mut().rev()) {
            if test.code == code::JUMP_IF_NOT {
                test.offset = i16::try_from(left).expect("a rule has eight instructions at most");
            }
        }
        program.extend(tests);
        program.extend(allow);
    }
    program.extend([
        instruction(code::MOVE, RESULT, 0, 0),
        instruction(code::EXIT, 0, 0, 0),
    ]);
    program
}

/// `BPF_PROG_LOAD` and its part of `union bpf_attr`; what follows in newer kernels may be left out.
const LOAD: libc::c_long = 5;
const CGROUP_DEVICE_PROGRAM: u32 = 15;
#[repr(C)]
struct LoadAttributes {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
}

/// `BPF_PROG_ATTACH` and its part of `union bpf_attr`.
const ATTACH: libc::c_long = 8;
const CGROUP_DEVICE_ATTACHMENT: u32 = 6;
/// `BPF_F_ALLOW_MULTI`: what is attached above keeps its say, and this cgroup's own children may have theirs.
const ALLOW_MULTI: u32 = 2;
#[repr(C)]
struct AttachAttributes {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
}

/// Lets the processes of a cgroup (v2) use only the devices that `rules` allow, from now on. Needs `CAP_SYS_ADMIN`.
/// The kernel forgets the program with the cgroup.
///
/// # Errors
///
/// What bpf(2) gives; among others when the kernel was built without `CONFIG_CGROUP_BPF`.
pub(crate) fn attach(cgroup: &Path, rules: &[Rule]) -> io::Result<()> {
    let cgroup = File::open(cgroup)?;
    // Kernels before 5.11 count programs as locked memory and start with little. The container has its limits already.
    let _ = nix::sys::resource::setrlimit(
        nix::sys::resource::Resource::RLIMIT_MEMLOCK,
        nix::sys::resource::RLIM_INFINITY,
        nix::sys::resource::RLIM_INFINITY,
    );
    let loaded = load_program(&program(rules))?;
    let attributes = AttachAttributes {
        target: cgroup.as_raw_fd(),
        program: loaded.as_raw_fd(),
        kind: CGROUP_DEVICE_ATTACHMENT,
        flags: ALLOW_MULTI,
    };
    bpf(ATTACH, &attributes).map(drop)
}

/// Whether the kernel takes such a program, without using it for anything.
///
/// # Errors
///
/// As [`attach`].
pub(crate) fn try_it() -> io::Result<()> {
    load_program(&program(&[])).map(drop)
}

fn load_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: CGROUP_DEVICE_PROGRAM,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
    };
    let fd = bpf(LOAD, &attributes)?;
    #[expect(unsafe_code, reason = "a descriptor that bpf(2) made")]
    // SAFETY: the kernel has just made it for this call, and nobody else knows it. It is close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2).
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    #[expect(unsafe_code, reason = "bpf(2) has no wrapper")]
    // SAFETY: the kernel reads `size_of::<T>()` bytes of `attributes`, and what they point to; both live through the
    // call. It takes attributes that are shorter than its own.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What the kernel would answer: an interpreter of the instructions used, which fails on any other.
    fn allows(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [None; 11];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: both,
                offset,
                immediate,
            } = program[at];
            at += 1;
            let (to, from) = (usize::from(both & 15), usize::from(both >> 4));
            let value: Option<i32> = registers[to];
            match code {
                code::LOAD_WORD => {
                    assert_eq!(from, usize::from(CONTEXT));
                    registers[to] = Some(context[usize::try_from(offset).unwrap() / 4]);
                }
                code::MOVE_REGISTER => registers[to] = Some(registers[from].unwrap()),
                code::MOVE => registers[to] = Some(immediate),
                code::AND => registers[to] = Some(value.unwrap() & immediate),
                code::SHIFT_RIGHT => registers[to] = Some(value.unwrap() >> immediate),
                code::JUMP_IF_NOT => {
                    if value.unwrap() != immediate {
                        at += usize::try_from(offset).unwrap();
                    }
                }
                code::EXIT => return registers[0].unwrap() == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn filter(allowed: &[Value]) -> Vec<Instruction> {
        let mut devices = vec![json!({"allow": false, "access": "rwm"})];
        devices.extend(allowed.iter().cloned());
        let configuration = json!({"linux": {"resources": {"devices": devices}}});
        program(&rules(&configuration).unwrap())
    }

    const BLOCK: i32 = Kind::Block as i32;
    const CHARACTER: i32 = Kind::Character as i32;

    #[test]
    fn without_rules_nothing_is_allowed() {
        let program = filter(&[]);
        for kind in [BLOCK, CHARACTER] {
            for access in 1..=ALL {
                assert!(!allows(&program, kind, access, 1, 3));
            }
        }
    }

    #[test]
    fn exactly_what_a_rule_names_is_allowed() {
        let program = filter(&[
            json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}),
            json!({"allow": true, "type": "c", "major": 136, "access": "rwm"}),
            json!({"allow": true, "type": "b", "major": 8, "minor": 1, "access": "r"}),
            json!({"allow": true, "type": "b", "access": "m"}),
        ]);
        for (kind, name) in [(BLOCK, "b"), (CHARACTER, "c")] {
            for major in [0, 1, 3, 8, 136, 4095] {
                for minor in [0, 1, 3, 1_048_575] {
                    for access in 1..=ALL {
                        let expected = match (name, major, minor) {
                            ("c", 1, 3) => access & MKNOD == 0,
                            ("c", 136, _) => true,
                            ("b", 8, 1) => access == READ || access == MKNOD,
                            ("b", ..) => access == MKNOD,
                            _ => false,
                        };
                        assert_eq!(
                            allows(&program, kind, access, major, minor),
                            expected,
                            "{name} {major}:{minor} {access}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn lists_that_do_not_begin_by_denying_all_or_deny_later_are_refused() {
        let deny = json!({"allow": false, "access": "rwm"});
        let harmless = json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"});
        for bad in [
            json!(null),
            json!([]),
            json!([null]),
            json!([{"allow": true, "access": "rwm"}]),
            json!([{"allow": false, "access": "rw"}]),
            json!([{"allow": false, "type": "c", "access": "rwm"}]),
            json!([{"allow": false, "major": 1, "access": "rwm"}]),
            json!([deny, deny]),
            json!([deny, {"allow": true, "access": "rwm"}]),
            json!([deny, {"allow": true, "type": "a", "access": "rwm"}]),
            json!([deny, {"allow": true, "type": "c", "major": -1, "access": "rwm"}]),
            json!([deny, {"allow": true, "type": "c", "major": "1", "access": "rwm"}]),
            json!([deny, {"allow": true, "type": "c", "major": 1, "access": "x"}]),
            json!([deny, {"allow": true, "type": "c", "major": 1}]),
        ] {
            let configuration = json!({"linux": {"resources": {"devices": bad}}});
            assert!(rules(&configuration).is_err(), "{bad}");
        }
        let good = json!({"linux": {"resources": {"devices": [deny, harmless]}}});
        assert_eq!(rules(&good).unwrap().len(), 1);
    }
}
