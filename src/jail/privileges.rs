//! What a process gives up before it is anybody's: its rights, and the ways to get them back.
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use super::JailError;
use super::path::Owner;

/// Most of a resource.
pub(crate) type Limit = (Resource, u64);

/// Sets limits that nothing in the jail can raise. Of two of a resource the last holds: the first, if it were set,
/// could not be exceeded by it.
pub(super) fn limit(limits: &[Limit]) -> Result<(), JailError> {
    for (index, (resource, most)) in limits.iter().enumerate() {
        if limits[index + 1..].iter().any(|(later, _)| later == resource) {
            continue;
        }
        let limit = Rlimit { current: Some(*most), maximum: Some(*most) };
        rustix::process::setrlimit(*resource, limit).map_err(|e| {
            let what =
                format!("set the limit {resource:?} to {most}; what it is cannot be exceeded");
            JailError::host(&what)(e)
        })?;
    }
    Ok(())
}

/// Becomes `owner`, without groups, capabilities and the hope of any. It is done to this thread, which is the only one.
pub(super) fn drop_all(Owner { uid, gid }: Owner) -> Result<(), JailError> {
    let failed = |what: &'static str| JailError::host::<Errno>(what);
    drop_bounding_set()?;
    rustix::thread::clear_ambient_capability_set().map_err(failed("clear capabilities"))?;
    rustix::thread::set_capabilities_secure_bits(SECURE_BITS)
        .map_err(failed("lock the secure bits"))?;
    rustix::thread::set_thread_groups(&[]).map_err(failed("leave all groups"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(failed("change the group"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(failed("change the user"))?;
    rustix::thread::set_capabilities(None, NONE).map_err(failed("give up capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(failed("set no_new_privs"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(failed("refuse debuggers"))?;
    verify(uid, gid)
}

const NONE: CapabilitySets = CapabilitySets {
    effective: CapabilitySet::empty(),
    permitted: CapabilitySet::empty(),
    inheritable: CapabilitySet::empty(),
};

/// Neither a user nor a program gives capabilities, and it stays so.
const SECURE_BITS: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_ROOT
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP)
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

fn drop_bounding_set() -> Result<(), JailError> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The kernel knows no more than these.
            Err(Errno::INVAL) if bit > 0 => break,
            Err(e) => return Err(JailError::host("empty the bounding set, which needs root")(e)),
        }
    }
    Ok(())
}

/// What was given up is gone, or there is no jail.
fn verify(uid: Uid, gid: Gid) -> Result<(), JailError> {
    let has_none = rustix::thread::capabilities(None) == Ok(NONE)
        && rustix::process::getgroups().is_ok_and(|groups| groups.is_empty())
        && (rustix::process::getuid(), rustix::process::geteuid()) == (uid, uid)
        && (rustix::process::getgid(), rustix::process::getegid()) == (gid, gid)
        && rustix::thread::no_new_privs() == Ok(true);
    match has_none {
        true => Ok(()),
        false => Err(JailError::host("give up privileges: some are still there")(Errno::PERM)),
    }
}
