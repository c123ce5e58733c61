-- One gateway tells what it holds and wants of a pool, and learns what it may hold.
--
-- KEYS: the pool, a hash: of every gateway g:ID, with what it last told; epoch, that
-- of the last lease that was begun; grace, until when nobody is given more; cap and
-- base, a capacity set at run time and the configured one that it replaces; drain;
-- turn, the last number of those that wait for their turn.
-- ARGV: gateway, number of this message, epoch of its lease, whether that is good by
-- its own clock, lease in ms, configured capacity, permits that it holds, in use,
-- wanted (with those in use), needed for the next to begin (0: something runs, or
-- nothing waits), awake, what to do ('', 'leave', 'resize', 'drain', 'resume'), to what.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local key, me = KEYS[1], ARGV[1]
local function arg(n) return tonumber(ARGV[n]) end
local number, epoch, good, lease, base = arg(2), arg(3), arg(4) == 1, arg(5), arg(6)
local hold, used, wanted, need, awake, what = arg(7), arg(8), arg(9), arg(10), arg(11), ARGV[12]

local h, raw = {}, redis.call('HGETALL', key)
for n = 1, #raw, 2 do h[raw[n]] = raw[n + 1] end

local capacity = base
if h.cap and tonumber(h.base) == base then capacity = tonumber(h.cap) end
if what == 'resize' then
  capacity = arg(13)
  if capacity == base then
    redis.call('HDEL', key, 'cap', 'base')
  else
    redis.call('HSET', key, 'cap', capacity, 'base', base)
  end
elseif what == 'drain' then
  h.drain = '1'
  redis.call('HSET', key, 'drain', '1')
elseif what == 'resume' then
  h.drain = nil
  redis.call('HDEL', key, 'drain')
end

-- Who there is. What a gateway held whose lease has ended is anybody's.
local all, mine, held, running = {}, nil, 0, 0
for field, value in pairs(h) do
  if field:sub(1, 2) == 'g:' then
    local f = {}
    for n in value:gmatch('%S+') do f[#f + 1] = tonumber(n) end
    local g = { id = field:sub(3), till = f[1], hold = f[2], used = f[3], wanted = f[4],
      need = f[5], hungry = f[6], awake = f[7], epoch = f[8], number = f[9] }
    if g.id == me then
      mine = g
    elseif g.till < now then
      redis.call('HDEL', key, field)
    elseif g.awake >= 0 then
      all[#all + 1] = g
      held, running = held + g.hold, running + g.used
    end
  end
end
if mine and mine.number >= number then return { 'late', key } end
if what == 'leave' then
  -- Its number stays for a while, so that an older message cannot bring it back.
  redis.call('HSET', key, 'g:' .. me, string.format('%.0f 0 0 0 0 0 -1 0 %.0f', now + lease, number))
  redis.call('PEXPIRE', key, 100 * lease)
  return { 'left', key }
end

-- A lease that has ended here gives no right to anything; what is in use is in use.
if not (mine and mine.till >= now and mine.epoch == epoch) then
  if good and not h.epoch then
    -- We have forgotten everything. Others may hold permits too: wait for them.
    h.grace = string.format('%.0f', now + lease)
    redis.call('HSET', key, 'grace', h.grace)
  elseif not (good and not mine and tonumber(h.grace or '0') > now) then
    hold = used
  end
  epoch = tonumber(h.epoch or '0') + 1
  redis.call('HSET', key, 'epoch', string.format('%.0f', epoch))
else
  hold = math.min(hold, mine.hold)
end
hold = math.max(hold, used)
local hungry = 0
if need > hold then
  hungry = mine and mine.hungry or 0
  if hungry == 0 then
    hungry = tonumber(h.turn or '0') + 1
    redis.call('HSET', key, 'turn', string.format('%.0f', hungry))
  end
end
local self = { id = me, hold = hold, used = used, wanted = wanted, need = need, hungry = hungry, awake = awake }
all[#all + 1] = self

-- What each may hold: first those that run nothing and have too little for their
-- next, the one that has waited longest first; then what all want, in equal parts as
-- far as they want it; and what is left then in equal parts too.
local rest, wake = capacity, 0
table.sort(all, function(a, b)
  local x, y = a.hungry > 0 and a.hungry or math.huge, b.hungry > 0 and b.hungry or math.huge
  if x ~= y then return x < y end
  return a.id < b.id
end)
for _, g in ipairs(all) do
  g.target = 0
  wake = wake + g.awake
  if g.hungry > 0 and math.min(g.need, capacity) <= rest then
    g.target = math.min(g.need, capacity)
    rest = rest - g.target
  end
  g.lack = math.max(0, math.min(g.wanted, capacity) - g.target)
end
table.sort(all, function(a, b)
  if a.lack ~= b.lack then return a.lack < b.lack end
  return a.id < b.id
end)
for n, g in ipairs(all) do
  local part = math.min(g.lack, math.floor(rest / (#all - n + 1)))
  g.target = g.target + part
  rest = rest - part
end
if wake > 0 then self.target = self.target + self.awake * math.floor(rest / wake) end

local more = 0
if tonumber(h.grace or '0') <= now then
  more = math.max(0, math.min(self.target - hold, capacity - held - hold))
end
hold = hold + more
redis.call('HSET', key, 'g:' .. me, string.format('%.0f %.0f %.0f %.0f %.0f %.0f %.0f %.0f %.0f',
  now + lease, hold, used, wanted, need, hungry, awake, epoch, number))
redis.call('PEXPIRE', key, 100 * lease)
local reply = { 'ok', key, ARGV[2] }
for _, n in ipairs({ hold, self.target, #all, running + used, capacity, h.drain and 1 or 0, epoch }) do
  reply[#reply + 1] = string.format('%.0f', n)
end
return reply
